"""The scan in integers leaves out only columns that no selection keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from triton_runs import (  # noqa: F401 - fixtures
    DEVICE,
    MARKS,
    bounds,
    poisoned_memory,
    quick_interpreter,
    random,
)

from vdr_db.errors import ConfigError, ShapeError
from vdr_db.kernels import reference
from vdr_db.kernels.cuda.configs import PoolTile
from vdr_db.kernels.cuda.scan import encoded, scan
from vdr_db.kernels.cuda.topk import select_topk

pytestmark = MARKS

TILE = PoolTile("aligned", 64, 16, 32, 2, 4, 2, True)


def batch(lengths, V, H, dtype=torch.float32, scale=1.0):
    hidden = random(0, sum(lengths), H) * scale
    return hidden.to(dtype), bounds(lengths), random(1, V, H).to(dtype)


def selections(inputs, k, activation, bias=None, lexical=None, tile=TILE):
    """Selection of what the scan leaves, of all columns in full, and how many the scan left."""
    hidden, cu_seqlens, weight = inputs
    codes = encoded(weight, bias)
    everything = dataclasses.replace(codes, per_score=torch.full_like(codes.per_score, torch.inf))
    chosen, n_left = [], []
    for one in (codes, everything):
        logits = scan(
            one, hidden, cu_seqlens, weight, bias, k=k, activation=activation, lexical=lexical,
            tile=tile,
        )  # fmt: skip
        chosen.append(select_topk(logits, k, activation=activation, lexical=lexical))
        n_left.append((logits != -torch.inf).sum(1))
    return *chosen, n_left[0]


def assert_same(got, expected):
    assert torch.equal(got.indptr, expected.indptr)
    assert torch.equal(got.columns, expected.columns)
    assert torch.allclose(got.weights, expected.weights, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("lengths", "V", "H", "k", "descriptors", "dtype"),
    [
        pytest.param([5, 0, 17, 1], 90, 40, 9, True, torch.bfloat16, id="ragged"),
        pytest.param([5, 0, 17, 1], 90, 40, 1, False, torch.float16, id="ragged-pointers"),
        pytest.param([33, 16], 70, 130, 70, True, torch.float32, id="full-blocks"),
        pytest.param([33, 16], 70, 130, 5, False, torch.float32, id="full-blocks-pointers"),
        pytest.param([1], 1, 16, 1, True, torch.float32, id="one-of-all"),
    ],
)
def test_leaves_what_is_kept(lengths, V, H, k, descriptors, dtype):
    tile = dataclasses.replace(TILE, descriptors=descriptors)
    inputs = batch(lengths, V, H, dtype)
    got, expected, _ = selections(inputs, k, "elu1p", tile=tile)
    assert_same(got, expected)
    truth = reference.project_pool(inputs[0].double(), inputs[1], inputs[2].double()).logits
    logits = scan(encoded(inputs[2]), *inputs, k=V, activation="elu1p", tile=tile)
    has_tokens = inputs[1].diff() > 0
    assert torch.allclose(logits[has_tokens].double(), truth[has_tokens], rtol=1e-5, atol=1e-4)
    assert (logits[~has_tokens] == -torch.inf).all()


@pytest.mark.parametrize("activation", ["elu1p", "log1p_relu", "double_log1p_relu", "none"])
def test_leaves_out_most(activation):
    bias = random(3, 400) - 20
    got, expected, left = selections(batch([12, 7], 400, 64), 15, activation, bias)
    assert_same(got, expected)
    assert (left < 400 * 0.5).all()


def test_keeps_the_columns_of_the_text():
    inputs = batch([5, 0, 3], 200, 32)
    lexical = (bounds([2, 1, 1], torch.int64), torch.tensor([7, 3, 0, 199], device=DEVICE))
    got, expected, left = selections(inputs, 5, "elu1p", lexical=lexical)
    assert_same(got, expected)
    assert (left < 200).all()


def test_ties_equal_columns_and_zeros():
    hidden, cu_seqlens, weight = batch([5, 9], 100, 24)
    weight[10:60] = weight[0]
    weight[60:80] = 0
    got, expected, _ = selections((hidden, cu_seqlens, weight), 7, "elu1p")
    assert_same(got, expected)
    got, expected, _ = selections((hidden * 0, cu_seqlens, weight), 7, "elu1p")
    assert_same(got, expected)


@pytest.mark.parametrize("where", ["hidden", "weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite(where, value):
    hidden, cu_seqlens, weight = batch([5, 9], 100, 24)
    if where == "hidden":
        hidden[2, 3] = value
    else:
        weight[20, 5] = value
    got, expected, _ = selections((hidden, cu_seqlens, weight), 7, "elu1p")
    assert_same(got, expected)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e18, 1e37])
def test_sizes_near_the_ends_of_float32(scale):
    got, expected, _ = selections(batch([5, 9], 100, 24, scale=scale), 7, "elu1p")
    assert_same(got, expected)


def test_outliers_cost_columns_and_not_results():
    """One large number makes the steps of its row, or of its text, coarse."""
    hidden, cu_seqlens, weight = batch([5, 9], 200, 24)
    hidden[1, 4] = 300.0
    weight[7, 4] = -300.0
    got, expected, left = selections((hidden, cu_seqlens, weight), 7, "elu1p")
    assert_same(got, expected)
    assert left[1] < left[0]


def test_any_strides_and_refusals():
    hidden, cu_seqlens, weight = batch([5, 9], 60, 24)
    expected = scan(encoded(weight), hidden, cu_seqlens, weight, k=5, activation="elu1p")
    strided = hidden.T.contiguous().T, cu_seqlens.repeat_interleave(2)[::2], weight.T.contiguous().T
    got = scan(encoded(strided[2]), *strided, k=5, activation="elu1p")
    assert torch.equal(got == -torch.inf, expected == -torch.inf)
    with pytest.raises(ShapeError, match="codes"):
        scan(encoded(weight[:5]), hidden, cu_seqlens, weight, k=5, activation="elu1p")
    with pytest.raises(ConfigError, match="tf32x3"):
        scan(encoded(weight), hidden, cu_seqlens, weight, k=5, activation="elu1p", precision="tf32")
    for k in (0, 61):
        with pytest.raises(ConfigError, match="`k`"):
            scan(encoded(weight), hidden, cu_seqlens, weight, k=k, activation="elu1p")
