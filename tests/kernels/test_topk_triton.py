"""The Triton selection against its definition: exact sets, exact ties, CSR without a sort."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
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
from vdr_db.kernels.cuda import topk_kernels
from vdr_db.kernels.cuda.configs import SELECT_TILES, SelectTiles
from vdr_db.kernels.cuda.topk import select_topk

pytestmark = MARKS

# One block holds 128 logits: V = 100 fits, V = 507 takes parts for k < 31 and loops beyond.
# The last part of V = 389 holds 5, fewer than k, so that its padding is among the candidates.
TILES = SelectTiles(
    row_block=128, row_warps=4, part_block=128, part_warps=4, loop_block=64, chunk=64, chunk_warps=4
)


def assert_same(logits, k, activation="elu1p", lexical=None, tiles=TILES):
    got = select_topk(logits, k, activation=activation, lexical=lexical, tiles=tiles)
    expected = reference.select_topk(logits, k, activation=activation, lexical=lexical)
    assert got.indptr.dtype == torch.int64
    assert got.columns.dtype == torch.int32
    assert torch.equal(got.indptr, expected.indptr)
    assert torch.equal(got.columns, expected.columns)
    assert torch.allclose(got.weights, expected.weights, rtol=2e-6, atol=1e-37, equal_nan=True)
    return got


def ties(V):
    """Halves of small integers, zeros of both signs among them."""
    return torch.round(random(0, 3, V)) / 2


def specials(V):
    """-inf, +inf and NaN of both signs."""
    logits = random(0, 3, V)
    logits[0] = -torch.inf
    logits[1, V // 2 :] = -torch.inf
    logits[2, V // 3] = torch.nan
    logits[2, V // 4] = -torch.nan
    logits[2, 0] = torch.inf
    return logits


@pytest.mark.parametrize(
    ("V", "k"),
    [(1, 1), (1, None), (100, 1), (100, 37), (100, 99), (100, 100), (128, 5), (389, 20),
     (507, 1), (507, 20), (507, 200), (507, 507), (507, None)],
)  # fmt: skip
@pytest.mark.parametrize("make", [ties, specials])
def test_matches_the_definition(make, V, k):
    assert_same(make(V), k)


@pytest.mark.parametrize("k", [1, 30, 64, 65, 126])
def test_all_equal_takes_the_first(k):
    for V in (127, 300):
        got = assert_same(torch.full((2, V), 0.5, device=DEVICE), k)
        assert got.columns[:k].tolist() == list(range(k))


@pytest.mark.parametrize("V", [100, 300])
def test_joins_lexical_columns(V):
    columns = torch.tensor([V - 1, 0, 31, 32, 31, 5], device=DEVICE)
    lexical = (bounds([5, 0, 1], torch.int64), columns)
    logits = specials(V)
    for k in (1, 12):
        assert_same(logits, k, lexical=lexical)
    assert_same(ties(V), 12, lexical=(bounds([5, 0, 1]), columns.int()))
    assert_same(ties(V), 12, lexical=(bounds([0, 0, 0]), columns[:0]))


@pytest.mark.parametrize("activation", ["elu1p", "log1p_relu", "double_log1p_relu", "none"])
def test_activations(activation):
    logits = random(0, 2, 100) * torch.logspace(-8, 2, 100, device=DEVICE)
    logits[1, :4] = torch.tensor([torch.inf, 1e30, -80.0, -torch.inf], device=DEVICE)
    assert_same(logits, 70, activation)
    assert_same(logits, None, activation)


def test_weights_end_where_the_exponential_does():
    """Weights down to the smallest subnormal number are kept, and none of 0."""
    logits = torch.linspace(-105, -102, 301, device=DEVICE)[None]
    kept = select_topk(logits, 300, activation="elu1p", tiles=TILES)
    assert logits[0, int(kept.columns[0])].item() == pytest.approx(-103.97, abs=1e-3)
    assert (kept.weights > 0).all()
    for activation in ("log1p_relu", "double_log1p_relu", "none"):
        tiny = torch.tensor([[-1.0, 0.0, -0.0, 1e-45, torch.nan]], device=DEVICE)
        kept = select_topk(tiny, 4, activation=activation, tiles=TILES)
        assert kept.columns.tolist() == [3, 4]
        assert kept.weights[0] > 0


def test_tiles_of_the_table():
    assert_same(random(0, 2, 700), 50, tiles=SELECT_TILES)


def test_bounded_buffers_need_no_wait():
    logits = specials(300)
    lexical = (bounds([1, 1, 0], torch.int64), torch.tensor([3, 4], device=DEVICE))
    expected = reference.select_topk(logits, 10, activation="elu1p", lexical=lexical)
    got = select_topk(logits, 10, activation="elu1p", lexical=lexical, trim=False, tiles=TILES)
    nnz = len(expected.columns)
    assert len(got.columns) == len(got.weights) == 3 * 10 + 2
    assert torch.equal(got.indptr, expected.indptr)
    assert torch.equal(got.columns[:nnz], expected.columns)


def test_numbers_whose_squares_overflow():
    for V in (100, 507):
        assert_same(random(0, 2, V) * 1e38, 20)
        assert_same(random(0, 2, V) * 1e-44, 20)


@triton.jit
def turns_kernel(logits_ptr, turns_ptr, n, k, BLOCK: tl.constexpr):
    """Turns of the search for the k-th largest of each row."""
    row = tl.program_id(0)
    keys = topk_kernels.load_keys(logits_ptr + row * n, 0, n, BLOCK, False)
    _, _, turns = topk_kernels.kth_largest(keys, logits_ptr, n, k, BLOCK, True, False)
    tl.store(turns_ptr + row, turns)


@pytest.mark.parametrize("k", [1, 64, 256, 768])
def test_few_turns_find_the_threshold(k):
    """Bit by bit it took 18 for numbers as these, pooled over 32 tokens; ties take many more."""
    rows, V = 16, 30522
    logits = torch.stack([random(seed, 32, V).amax(0) for seed in range(rows)])
    turns = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    turns_kernel[(rows,)](logits, turns, V, k, BLOCK=32768)
    assert turns.double().mean() <= 8
    turns_kernel[(rows,)](logits.round(), turns, V, k, BLOCK=32768)
    assert turns.max() <= 8 + 32


def test_strided_rows_and_no_rows():
    logits = random(0, 4, 150)
    assert_same(logits[::2, 20:120], 9)
    assert_same(random(0, 100, 4).T, 9)
    assert_same(logits[:0], 9)


def test_refuses_what_it_cannot_select():
    logits = random(0, 2, 10)
    for k in (0, 11, True):
        with pytest.raises(ConfigError, match="`k`"):
            select_topk(logits, k, activation="elu1p")
    with pytest.raises(ConfigError, match="activation"):
        select_topk(logits, 1, activation="gelu")
    with pytest.raises(ShapeError, match="float32"):
        select_topk(logits.double(), 1, activation="elu1p")
