"""The reference in float64 is what plain NumPy loops say, and refuses what it cannot use."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import batches, bounds_of, choices

from vdr_db.errors import ConfigError, ShapeError
from vdr_db.kernels import ACTIVATIONS, activate
from vdr_db.kernels.reference import project_pool, select_topk


def arrays(batch):
    return [None if tensor is None else tensor.numpy() for tensor in batch]


def as_rows(selection):
    """CSR to one dictionary per row, checking its form on the way."""
    indptr, columns, weights = selection
    assert (indptr.dtype, columns.dtype, weights.dtype) == (
        torch.int64,
        torch.int32,
        torch.float32,
    )
    assert indptr[0] == 0
    assert indptr[-1] == len(columns) == len(weights)
    rows = []
    for start, end in zip(indptr.tolist(), indptr.tolist()[1:], strict=False):
        row = columns[start:end].tolist()
        assert row == sorted(set(row))
        rows.append(dict(zip(row, weights[start:end].tolist(), strict=True)))
    return rows


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(x=st.floats(-300, 1e6))
def test_activations_are_the_formulas(activation, x):
    got = activate(torch.tensor([x], dtype=torch.float64), activation).item()
    assert got == pytest.approx(oracles.ACTIVATIONS[activation](x), rel=1e-14, abs=1e-300)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_the_edges(activation):
    edges = torch.tensor([-torch.inf, -0.0, 0.0, torch.inf, torch.nan], dtype=torch.float64)
    got = activate(edges, activation).tolist()
    zero = 1.0 if activation == "elu1p" else 0.0
    least = -np.inf if activation == "none" else 0.0
    np.testing.assert_array_equal(got, [least, zero, zero, np.inf, np.nan])


def test_elu1p_keeps_small_weights_where_elu_plus_one_rounds_them_away():
    x = torch.tensor([-20.0])
    assert torch.nn.functional.elu(x) + 1 == 0
    assert activate(x, "elu1p").item() == pytest.approx(2.0611536e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_differentiate(activation):
    x = torch.tensor([-80.0, -1.5, 0.5, 3.0, 90.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: activate(x, activation), x)
    activate(torch.tensor([1e4, -1e4], requires_grad=True), activation).sum().backward()


def test_unknown_activation_is_named():
    with pytest.raises(ConfigError, match=r"one of .*'elu1p'.*got 'gelu'"):
        activate(torch.zeros(1), "gelu")


@settings(max_examples=60)
@given(batch=batches(special=True))
def test_pooled_logits_are_the_loops(batch):
    pooled = project_pool(*batch, return_argmax=True)
    with np.errstate(invalid="ignore"):
        logits, argmax = oracles.pool(*arrays(batch))
    np.testing.assert_allclose(pooled.logits.numpy(), logits, rtol=1e-12, atol=1e-12)
    assert pooled.argmax.dtype == torch.int32
    # Sums over H differ in the last bit, which may decide between near ties: compare by value.
    differs = pooled.argmax.numpy() != argmax
    for b, v in zip(*differs.nonzero(), strict=True):
        token = batch.cu_seqlens[b] + pooled.argmax[b, v]
        product = (batch.hidden[token] @ batch.weight[v]).item()
        product += 0 if batch.bias is None else batch.bias[v].item()
        np.testing.assert_allclose(product, logits[b, v], rtol=1e-12, atol=1e-12)


def test_first_token_wins_ties_and_zeros_are_positive():
    hidden = torch.tensor([[1.0], [2.0], [2.0], [-0.0]])
    pooled = project_pool(
        hidden, torch.tensor([0, 3, 4]), torch.tensor([[1.0], [-1.0]]), return_argmax=True
    )
    assert pooled.argmax.tolist() == [[1, 0], [0, 0]]
    assert pooled.logits.tolist() == [[2.0, -1.0], [0.0, 0.0]]
    assert not pooled.logits.signbit()[1].any()


def test_half_precision_is_computed_in_float32():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((5, 64), generator=generator).bfloat16()
    weight = torch.randn((9, 64), generator=generator).bfloat16()
    pooled = project_pool(hidden, bounds_of([5]), weight)
    exact = project_pool(hidden.double(), bounds_of([5]), weight.double())
    assert pooled.logits.dtype == torch.float32
    assert pooled.argmax is None
    torch.testing.assert_close(pooled.logits.double(), exact.logits, rtol=1e-5, atol=1e-5)


@given(choice=choices())
def test_selection_is_the_loops(choice):
    logits, k, activation, lexical = choice
    got = as_rows(select_topk(logits, k, activation=activation, lexical=lexical))
    sets = None
    if lexical is not None:
        indptr, columns = lexical
        cuts = zip(indptr.tolist(), indptr.tolist()[1:], strict=False)
        sets = [columns[start:end].tolist() for start, end in cuts]
    expected = oracles.select(logits.numpy(), k, activation, sets)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        # exp(-200) is positive in float64 and nothing in float32, and torch's float32 functions may
        # take subnormal numbers for zero.
        one = {v: w for v, w in one.items() if other.get(v, 1) >= np.finfo(np.float32).tiny}
        other = {v: w for v, w in other.items() if w >= np.finfo(np.float32).tiny}
        assert one.keys() == other.keys()
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-6, atol=1e-44)


@pytest.mark.parametrize("k", [0, -1, 8, 2.0, True, "3"])
def test_impossible_k(k):
    with pytest.raises(ConfigError, match=r"`k` must be an integer from 1 to V = 7, or None"):
        select_topk(torch.zeros(2, 7), k, activation="none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"`hidden` must be \[T, H\].*got \[2, 3, 4\] float32"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, "got .* int64"),
        ({"hidden": torch.zeros(3, 5)}, "must agree in H"),
        ({"weight": torch.zeros(0, 4)}, "at least 1"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, "int32 or int64, got"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, r"an empty batch is \[0\]"),
        ({"cu_seqlens": torch.tensor([0, 2])}, "end at T = 3"),
        ({"cu_seqlens": torch.tensor([1, 3])}, "start at 0"),
        ({"cu_seqlens": torch.tensor([0, 2, 1, 3])}, "never fall"),
        ({"bias": torch.zeros(6)}, r"`bias` must be \[V\] = \[5\]"),
        ({"weight": torch.zeros((5, 4), device="meta")}, r"one device.*\['cpu', 'meta'\]"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    inputs = {
        "hidden": torch.zeros(3, 4),
        "cu_seqlens": torch.tensor([0, 3]),
        "weight": torch.zeros(5, 4),
    }
    with pytest.raises(ShapeError, match=message):
        project_pool(**(inputs | change))


@pytest.mark.parametrize(
    ("logits", "lexical", "message"),
    [
        (torch.zeros(3), None, r"`logits` must be \[B, V\]"),
        (torch.zeros(2, 7, dtype=torch.bfloat16), None, "half precision makes ties"),
        (
            torch.zeros(2, 7),
            (torch.tensor([0, 1]), torch.tensor([1])),
            r"indptr \[B \+ 1\] = \[3\]",
        ),
        (torch.zeros(2, 7), (torch.tensor([0, 1, 1]), torch.tensor([7])), r"in \[0, V = 7\)"),
        (torch.zeros(2, 7), (torch.tensor([0, 1, 1]), torch.tensor([-1])), "token ids"),
        (torch.zeros(2, 7), (torch.tensor([0, 2, 1]), torch.tensor([1])), "never fall"),
    ],
)
def test_wrong_selections_are_named(logits, lexical, message):
    with pytest.raises(ShapeError, match=message):
        select_topk(logits, 1, activation="none", lexical=lexical)
