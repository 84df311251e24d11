"""The Triton gradients against autograd through the reference in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from triton_runs import (  # noqa: F401 - fixtures
    DEVICE,
    DTYPES,
    IS_INTERPRETED,
    MARKS,
    assert_no_worse,
    bounds,
    eager_pool,
    poisoned_memory,
    quick_interpreter,
    random,
    unit_roundoff,
)

from vdr_db.errors import ConfigError, ShapeError
from vdr_db.kernels import project_pool, reference
from vdr_db.kernels.cuda import backward as pooling_backward
from vdr_db.kernels.cuda import entry_lists, pooling
from vdr_db.kernels.cuda.configs import BackwardTiles

pytestmark = MARKS

# Small enough that every loop runs several times; lists of more than 16 entries are split.
TILES = BackwardTiles(
    onehot_length=8, weight_v=16, gather_h=16, rows=4, split=16, chunk=64, place_warps=4,
    onehot_m=32, onehot_h=16, onehot_k=16, gather_warps=4, onehot_warps=4,
)  # fmt: skip
METHODS = pytest.mark.parametrize("method", ["gather", "onehot"])

SHAPES = [
    pytest.param([5, 0, 17, 1], 90, 40, id="ragged"),
    pytest.param([63, 64, 65], 33, 16, id="63-64-65"),
    pytest.param([1], 1, 16, id="one"),
    pytest.param([0, 2, 0], 150, 37, id="empty-odd"),
]


def gradients64(hidden, cu_seqlens, weight, grad, pool=reference.project_pool):
    """Gradients of hidden and weight for logits' gradient `grad`; -inf rows pass nothing."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    logits = pool(leaves[0], cu_seqlens, leaves[1], None)
    logits = getattr(logits, "logits", logits)
    has_tokens = cu_seqlens.diff() > 0
    loss = (logits[has_tokens] * grad[has_tokens].to(logits.dtype)).sum()
    return torch.autograd.grad(loss, leaves)


def rounding(hidden, cu_seqlens, weight, grad, truth, dtype, method):
    """Rounding to allow for: the output's and, on the matrix unit, that of each gradient."""
    unit = unit_roundoff(dtype)
    slack = [unit * x.abs() for x in truth]
    if method == "onehot":
        argmax = reference.project_pool(hidden, cu_seqlens, weight, return_argmax=True).argmax
        sums = torch.zeros_like(hidden), torch.zeros_like(weight)
        for text, start in enumerate(cu_seqlens[:-1].tolist()):
            if argmax[text, 0] >= 0:
                tokens = start + argmax[text].long()
                size = grad[text].abs().double()[:, None]
                sums[0].index_add_(0, tokens, size * weight.abs())
                sums[1].add_(size * hidden[tokens].abs())
        slack = [s + unit * x for s, x in zip(slack, sums, strict=True)]
    return slack


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@METHODS
@pytest.mark.parametrize(("lengths", "V", "H"), SHAPES)
def test_matches_float64(lengths, V, H, method, dtype):
    hidden, weight = random(0, sum(lengths), H, dtype=dtype), random(1, V, H, dtype=dtype)
    grad, cu_seqlens = random(2, len(lengths), V), bounds(lengths)
    argmax = reference.project_pool(
        hidden.double(), cu_seqlens, weight.double(), return_argmax=True
    )
    got = pooling.backward(
        grad, argmax.argmax, hidden, cu_seqlens, weight, True, True, True,
        method=method, tiles=TILES,
    )  # fmt: skip
    truth = gradients64(hidden.double(), cu_seqlens, weight.double(), grad)
    eager = gradients64(hidden, cu_seqlens, weight, grad, eager_pool)
    slack = rounding(hidden.double(), cu_seqlens, weight.double(), grad, truth, dtype, method)
    for found, plain, right, allowed in zip(got[:2], eager, truth, slack, strict=True):
        assert found.dtype == dtype
        assert_no_worse(found, plain, right, allowed)
    bias = grad[cu_seqlens.diff() > 0].double().sum(0)
    assert torch.allclose(got[2].double(), bias, atol=1e-5)


def kept(argmax, V, per_row):
    """A selection of `per_row` columns per text, fewer in the second: CSR and positions."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for text in range(argmax.shape[0]):
        n = min(V, per_row // 2 if text == 1 else per_row)
        rows.append(torch.randperm(V, generator=generator)[:n].sort().values)
    columns = torch.cat(rows).to(DEVICE)
    indptr = bounds([len(row) for row in rows], torch.int64)
    texts = torch.repeat_interleave(torch.arange(len(rows), device=DEVICE), indptr.diff())
    return indptr, columns.int(), texts, argmax[texts, columns]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counted", [True, False], ids=["count", "sort"])
@pytest.mark.parametrize(("lengths", "V", "H"), SHAPES)
def test_kept_entries_match_float64(monkeypatch, lengths, V, H, counted, dtype):
    if not counted:
        monkeypatch.setattr(entry_lists, "LARGEST_COUNTS", 0)
    hidden, weight = random(0, sum(lengths), H, dtype=dtype), random(1, V, H, dtype=dtype)
    cu_seqlens = bounds(lengths)
    pooled = reference.project_pool(
        hidden.double(), cu_seqlens, weight.double(), return_argmax=True
    )
    indptr, columns, texts, positions = kept(pooled.argmax, V, 40)
    values = random(2, len(columns))
    grad = torch.zeros_like(pooled.logits)
    grad[texts, columns.long()] = values.double()
    got = pooling.backward_sparse(
        values, indptr, columns, positions.to(torch.int16), hidden, cu_seqlens, weight,
        True, True, True, tiles=TILES,
    )  # fmt: skip
    truth = gradients64(hidden.double(), cu_seqlens, weight.double(), grad)
    eager = gradients64(hidden, cu_seqlens, weight, grad, eager_pool)
    slack = [unit_roundoff(dtype) * x.abs() for x in truth]
    for found, plain, right, allowed in zip(got[:2], eager, truth, slack, strict=True):
        assert_no_worse(found, plain, right, allowed)
    bias = grad[cu_seqlens.diff() > 0].sum(0)
    assert torch.allclose(got[2].double(), bias, atol=1e-5)


@METHODS
def test_one_token_that_wins_everything(method):
    hidden, weight = random(0, 40, 24) / 10, random(1, 200, 24).abs()
    hidden[[3, 25]] = 5.0
    cu_seqlens, grad = bounds([20, 20]), random(2, 2, 200)
    _, argmax = pooling.forward(hidden, cu_seqlens, weight, None, True)
    assert argmax[0].unique().tolist() == [3]
    got = pooling.backward(grad, argmax, hidden, cu_seqlens, weight, method=method, tiles=TILES)
    truth = gradients64(hidden.double(), cu_seqlens, weight.double(), grad)
    for found, right in zip(got[:2], truth, strict=True):
        assert torch.allclose(found.double(), right, rtol=1e-5, atol=1e-5)


@METHODS
def test_ties_go_to_the_lowest_token(method):
    hidden, weight = torch.ones((6, 16), device=DEVICE), torch.ones((4, 16), device=DEVICE)
    cu_seqlens, grad = bounds([2, 4]), random(2, 2, 4)
    _, argmax = pooling.forward(hidden, cu_seqlens, weight, None, True)
    grad_hidden, _, _ = pooling.backward(
        grad, argmax, hidden, cu_seqlens, weight, method=method, tiles=TILES
    )
    expected = torch.zeros_like(hidden)
    expected[[0, 2]] = grad.sum(1)[:, None]
    assert torch.allclose(grad_hidden, expected, atol=1e-6)


@METHODS
def test_tokens_behind_the_last_text_get_nothing(method):
    hidden, weight, cu_seqlens = random(0, 40, 16), random(1, 20, 16), bounds([4, 17])
    grad = random(2, 2, 20)
    hidden[21:] = torch.nan
    _, argmax = pooling.forward(hidden, cu_seqlens, weight, None, True)
    grad_hidden, grad_weight, _ = pooling.backward(
        grad, argmax, hidden, cu_seqlens, weight, method=method, tiles=TILES
    )
    truth = gradients64(hidden[:21].double(), cu_seqlens, weight.double(), grad)
    assert not grad_hidden[21:].any()
    assert torch.allclose(grad_hidden[:21].double(), truth[0], atol=1e-5)
    assert torch.allclose(grad_weight.double(), truth[1], atol=1e-5)


@METHODS
def test_runs_repeat_bit_for_bit(method):
    hidden, weight, cu_seqlens = random(0, 30, 24), random(1, 100, 24), bounds([10, 20])
    grad = random(2, 2, 100)
    _, argmax = pooling.forward(hidden, cu_seqlens, weight, None, True)
    runs = [
        pooling.backward(grad, argmax, hidden, cu_seqlens, weight, method=method, tiles=TILES)
        for _ in range(2)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_gives_only_what_is_needed():
    hidden, weight, cu_seqlens = random(0, 12, 16), random(1, 20, 16), bounds([12])
    grad = random(2, 1, 20)
    _, argmax = pooling.forward(hidden, cu_seqlens, weight, None, True)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        got = pooling.backward(grad, argmax, hidden, cu_seqlens, weight, *wanted, tiles=TILES)
        assert [x is not None for x in got] == list(wanted)
        indptr, columns, _, positions = kept(argmax, 20, 5)
        got = pooling.backward_sparse(
            random(3, 5), indptr, columns, positions, hidden, cu_seqlens, weight, *wanted,
            tiles=TILES,
        )  # fmt: skip
        assert [x is not None for x in got] == list(wanted)


def test_batches_without_tokens_give_zeros():
    weight, hidden, cu_seqlens = random(1, 20, 16), random(0, 0, 16), bounds([0, 0])
    _, argmax = pooling.forward(hidden, cu_seqlens, weight, None, True)
    got = pooling.backward(
        torch.ones((2, 20), device=DEVICE), argmax, hidden, cu_seqlens, weight, True, True, True
    )
    assert got[0].shape == (0, 16)
    assert not got[1].any()
    assert not got[2].any()
    nothing = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    got = pooling.backward_sparse(
        torch.zeros(0, device=DEVICE), bounds([0]), nothing, nothing, random(0, 3, 16), bounds([3]),
        weight, True, True, True,
    )  # fmt: skip
    assert not any(x.any() for x in got)


def test_long_and_short_texts_choose_a_method(monkeypatch):
    calls = []
    for name in ("gather_weight", "multiply_onehot"):
        plain = getattr(pooling_backward, name)
        monkeypatch.setattr(
            pooling_backward,
            name,
            lambda *a, _name=name, _plain=plain: (calls.append(_name), _plain(*a)),
        )
    weight = random(1, 20, 16)
    for length in (8, 9):
        hidden, cu_seqlens = random(0, length, 16), bounds([length])
        _, argmax = pooling.forward(hidden, cu_seqlens, weight, None, True)
        grad = random(2, 1, 20)
        pooling.backward(grad, argmax, hidden, cu_seqlens, weight, False, tiles=TILES)
    assert calls == ["multiply_onehot", "gather_weight"]


def test_autograd_through_the_public_function():
    cu_seqlens, grad = bounds([3, 0, 6]), random(2, 3, 30)
    hidden, weight = random(0, 9, 16), random(1, 30, 16)
    truth = gradients64(hidden.double(), cu_seqlens, weight.double(), grad)

    def pool(hidden, cu_seqlens, weight, bias):
        return project_pool(hidden, cu_seqlens, weight, bias, backend="triton")

    found = gradients64(hidden, cu_seqlens, weight, grad, pool)
    for got, right in zip(found, truth, strict=True):
        assert torch.allclose(got.double(), right, atol=1e-5)


def test_refuses_what_disagrees():
    hidden, weight, cu_seqlens = random(0, 12, 16), random(1, 20, 16), bounds([12])
    grad = random(2, 1, 20)
    _, argmax = pooling.forward(hidden, cu_seqlens, weight, None, True)
    with pytest.raises(ConfigError, match="method"):
        pooling.backward(grad, argmax, hidden, cu_seqlens, weight, method="atomics")
    with pytest.raises(ShapeError, match="grad_logits"):
        pooling.backward(grad[:, :5], argmax, hidden, cu_seqlens, weight)
    with pytest.raises(ShapeError, match="grad_values"):
        pooling.backward_sparse(
            grad[0], bounds([20]), argmax[0, :5], argmax[0], hidden, cu_seqlens, weight
        )


@pytest.mark.parametrize("is_wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("is_kept", [False, True], ids=["all", "kept"])
def test_entries_are_listed_by_token(monkeypatch, is_wide, is_kept):
    """Rows that begin and end within chunks, texts without tokens, keys of 32 and of 64 bits."""
    if is_wide:
        monkeypatch.setattr(entry_lists, "SHORT_KEYS", 0)
    B, V = 4, 100
    cu_seqlens = bounds([7, 0, 20, 3])
    argmax = torch.stack([torch.arange(V) * 37 % 5, torch.full((V,), -1), torch.arange(V) * 11 % 20,
                          torch.arange(V) % 3]).to(torch.int16).to(DEVICE)  # fmt: skip
    indptr = torch.arange(B + 1, device=DEVICE) * V
    texts = torch.arange(B, device=DEVICE).repeat_interleave(V)
    if is_kept:
        indptr, _, texts, argmax = kept(argmax, V, 90)
    tokens = torch.where(argmax.flatten() < 0, -1, cu_seqlens[texts] + argmax.flatten())
    token_texts = reference.text_of(cu_seqlens, 33, out_int32=True)
    order, ends, totals = entry_lists.lists_of(
        tokens, 33, indptr, token_texts, V, TILES, within_text=not is_kept
    )
    number = torch.arange(len(texts), device=DEVICE) % (len(texts) if is_kept else V)
    for t in range(30):
        expected = number[tokens == t]
        assert order[ends[t] - totals[t] : ends[t]].tolist() == expected.tolist()
    assert not totals[30:].any()


@pytest.mark.parametrize("counted", [True, False], ids=["count", "sort"])
def test_entries_are_listed_by_column(monkeypatch, counted):
    """More chunks than are added up at once, and columns that nobody keeps."""
    if not counted:
        monkeypatch.setattr(entry_lists, "LARGEST_COUNTS", 0)
    rows, n = 30 if IS_INTERPRETED else 300, 70
    columns = torch.cat([torch.arange(row % 3, n, 2) for row in range(rows)]).int().to(DEVICE)
    bounds = torch.tensor([0, len(columns)], device=DEVICE)
    order, ends, totals = entry_lists.lists_of(columns, n + 5, bounds, None, len(columns), TILES)
    assert -(-len(columns) // TILES.chunk) > entry_lists.OFFSET_ROWS
    for column in range(n + 5):
        expected = (columns == column).nonzero()[:, 0]
        assert order[ends[column] - totals[column] : ends[column]].tolist() == expected.tolist()
