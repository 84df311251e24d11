"""The Triton forward against float64: values, positions, and the rules at the edges."""

from __future__ import annotations

import dataclasses

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
)

from vdr_db.errors import ConfigError, ShapeError
from vdr_db.kernels import reference
from vdr_db.kernels.arguments import argmax_dtype
from vdr_db.kernels.cuda import pooling
from vdr_db.kernels.cuda.configs import PoolTile, pool_tile
from vdr_db.kernels.cuda.topk import select_topk

pytestmark = MARKS

ALIGNED = PoolTile("aligned", 64, 16, 16, 2, 4, 2, descriptors=True)
PACKED = PoolTile("packed", 64, 16, 16, 2, 4, 2, descriptors=True)
BY_POINTERS = PoolTile("aligned", 64, 16, 16, 2, 4, 2, descriptors=False)
PACKED_BY_POINTERS = PoolTile("packed", 64, 16, 16, 2, 4, 2, descriptors=False)
TILES = [ALIGNED, PACKED, BY_POINTERS, PACKED_BY_POINTERS]
NAMES = ["aligned", "packed", "aligned-pointers", "packed-pointers"]
LAYOUTS = pytest.mark.parametrize("tile", [ALIGNED, PACKED], ids=["aligned", "packed"])

SHAPES = [
    pytest.param([5, 0, 17, 1, 33], 70, 40, id="ragged"),
    pytest.param([63, 64, 65], 33, 48, id="63-64-65"),
    pytest.param([1], 1, 16, id="one"),
    pytest.param([0, 3, 0, 2, 0], 507, 24, id="V507"),
    pytest.param([1] * 20, 40, 37, id="one-token-texts-odd-H"),
]


def pool64(hidden, cu_seqlens, weight, bias=None):
    bias = None if bias is None else bias.double()
    return reference.project_pool(
        hidden.double(), cu_seqlens, weight.double(), bias, return_argmax=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=NAMES)
@pytest.mark.parametrize(("lengths", "V", "H"), SHAPES)
def test_matches_float64(lengths, V, H, tile, dtype):
    hidden, weight = random(0, sum(lengths), H, dtype=dtype), random(1, V, H, dtype=dtype)
    bias, cu_seqlens = random(2, V), bounds(lengths)
    logits, argmax = pooling.forward(hidden, cu_seqlens, weight, bias, True, tile=tile)
    truth = pool64(hidden, cu_seqlens, weight, bias)
    assert_no_worse(logits, eager_pool(hidden, cu_seqlens, weight, bias), truth.logits)
    assert torch.equal(argmax, truth.argmax)
    values, positions = pooling.forward(hidden, cu_seqlens, weight, bias, tile=tile)
    assert torch.equal(values, logits)
    assert positions is None


@pytest.mark.parametrize("length", [9, 200], ids=["short", "long"])
def test_the_tiles_of_the_table(length):
    lengths = [length, 1, 0, length + 40]
    hidden, weight, cu_seqlens = random(0, sum(lengths), 72), random(1, 300, 72), bounds(lengths)
    logits, argmax = pooling.forward(hidden, cu_seqlens, weight, None, True)
    truth = pool64(hidden, cu_seqlens, weight)
    assert_no_worse(logits, eager_pool(hidden, cu_seqlens, weight, None), truth.logits)
    assert torch.equal(argmax, truth.argmax)


@LAYOUTS
def test_bfloat16(tile):
    hidden = random(0, 21, 32, dtype=torch.bfloat16)
    weight, cu_seqlens = random(1, 40, 32, dtype=torch.bfloat16), bounds([4, 17])
    logits, argmax = pooling.forward(hidden, cu_seqlens, weight, None, True, tile=tile)
    truth = pool64(hidden, cu_seqlens, weight)
    assert_no_worse(logits, eager_pool(hidden, cu_seqlens, weight, None), truth.logits)
    assert torch.equal(argmax, truth.argmax)


@LAYOUTS
def test_lowest_token_wins_ties(tile):
    hidden = torch.ones((40, 16), device=DEVICE)
    hidden[20] = 2.0
    weight, cu_seqlens = torch.ones((5, 16), device=DEVICE), bounds([18, 22])
    weight[1] = 0.0
    weight[2] = -1.0
    _, argmax = pooling.forward(hidden, cu_seqlens, weight, None, True, tile=tile)
    assert argmax.tolist() == [[0] * 5, [2, 0, 0, 2, 2]]


@LAYOUTS
def test_zeros_come_out_positive(tile):
    hidden, cu_seqlens = torch.zeros((3, 16), device=DEVICE), bounds([1, 2])
    weight = torch.full((4, 16), -1.0, device=DEVICE)
    bias = torch.full((4,), -0.0, device=DEVICE)
    logits, _ = pooling.forward(hidden, cu_seqlens, weight, bias, tile=tile)
    assert not logits.signbit().any()


@LAYOUTS
@pytest.mark.parametrize("need_argmax", [False, True])
def test_minus_infinity_and_nan(tile, need_argmax):
    hidden, weight = random(0, 30, 16).abs() + 0.1, random(1, 20, 16).abs() + 0.1
    hidden[:4] = -torch.inf  # the first text has no finite product
    hidden[9, 3] = torch.nan  # a token of the second
    hidden[7] = torch.inf
    hidden[22] = torch.nan  # two tokens of the third: the lower one is the maximum
    hidden[25] = torch.nan
    cu_seqlens = bounds([4, 15, 11])
    logits, argmax = pooling.forward(hidden, cu_seqlens, weight, None, need_argmax, tile=tile)
    assert (logits[0] == -torch.inf).all()
    assert logits[1:].isnan().all()
    if need_argmax:
        assert argmax.tolist() == [[0] * 20, [5] * 20, [3] * 20]


@LAYOUTS
def test_infinite_maxima_have_their_first_token(tile):
    """Their distances are NaN, so that another pass looks for them, also in the last columns."""
    V = 150
    hidden, weight = random(0, 60, 16).abs() + 0.1, random(1, V, 16).abs() + 0.1
    weight[100:] *= -1
    hidden[[9, 40, 41]] = torch.inf  # +inf for the first columns, -inf for the others
    cu_seqlens = bounds([5, 21, 30, 4])
    logits, argmax = pooling.forward(hidden, cu_seqlens, weight, random(2, V), True, tile=tile)
    truth = pool64(hidden, cu_seqlens, weight)
    assert torch.equal(logits.isinf(), truth.logits.isinf())
    assert torch.equal(argmax, truth.argmax)
    hidden[9] = -torch.inf
    hidden[5:26] = hidden[9]  # nothing else in the text
    logits, argmax = pooling.forward(hidden, cu_seqlens, weight, None, True, tile=tile)
    assert argmax[1].tolist() == [0] * V
    assert (logits[1, :100] == -torch.inf).all()
    assert (logits[1, 100:] == torch.inf).all()


@LAYOUTS
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_neighbours_do_not_leak(tile, poison):
    hidden, weight, cu_seqlens = random(0, 12, 16), random(1, 20, 16), bounds([0, 3, 4, 0, 5])
    alone = [pooling.forward(hidden[3:7], bounds([4]), weight, None, True, tile=tile)]
    hidden[:3] = poison
    hidden[7:] = poison
    logits, argmax = pooling.forward(hidden, cu_seqlens, weight, None, True, tile=tile)
    assert torch.equal(logits[2:3], alone[0][0])
    assert torch.equal(argmax[2:3], alone[0][1])
    assert (logits[[0, 3]] == -torch.inf).all()
    assert (argmax[[0, 3]] == -1).all()


@LAYOUTS
def test_bits_do_not_depend_on_the_batch(tile):
    lengths = [7, 1, 30, 16, 2]
    hidden, weight = random(0, sum(lengths), 48), random(1, 50, 48)
    texts = hidden.split(lengths)
    first, _ = pooling.forward(hidden, bounds(lengths), weight, tile=tile)
    again, _ = pooling.forward(hidden, bounds(lengths), weight, tile=tile)
    assert torch.equal(first, again)
    order = [3, 0, 4, 2, 1]
    turned = torch.cat([texts[text] for text in order])
    moved, _ = pooling.forward(turned, bounds([lengths[x] for x in order]), weight, tile=tile)
    assert torch.equal(moved, first[order])
    for text, row in zip(texts, first, strict=True):
        alone, _ = pooling.forward(text, bounds([len(text)]), weight, tile=tile)
        assert torch.equal(alone[0], row)


@LAYOUTS
@pytest.mark.parametrize("how", ["offset", "every-second", "transposed", "columns"])
def test_sliced_and_strided_inputs(tile, how):
    cu_seqlens, hidden = bounds([5, 12]), random(0, 17, 20)
    weight = {
        "offset": random(1, 40, 20)[7:],
        "every-second": random(1, 80, 20)[::2],
        "transposed": random(1, 20, 40).T,
        "columns": random(1, 40, 33)[:, 5:25],
    }[how]
    if how == "columns":
        hidden = random(0, 17, 50)[:, 1:41:2]
    logits, argmax = pooling.forward(hidden, cu_seqlens, weight, None, True, tile=tile)
    truth = pool64(hidden, cu_seqlens, weight)
    assert_no_worse(logits, eager_pool(hidden, cu_seqlens, weight, None), truth.logits)
    assert torch.equal(argmax, truth.argmax)


@LAYOUTS
def test_batches_without_tokens(tile):
    weight, nothing = random(1, 20, 16), random(0, 0, 16)
    logits, argmax = pooling.forward(nothing, bounds([0, 0]), weight, None, True, tile=tile)
    assert (logits == -torch.inf).all()
    assert (argmax == -1).all()
    logits, argmax = pooling.forward(nothing, bounds([]), weight, None, True, tile=tile)
    assert logits.shape == argmax.shape == (0, 20)


@LAYOUTS
def test_tokens_behind_the_last_text_take_no_part(tile):
    hidden, weight, cu_seqlens = random(0, 40, 16), random(1, 20, 16), bounds([4, 17])
    expected, _ = pooling.forward(hidden[:21], cu_seqlens, weight, tile=tile)
    hidden[21:] = torch.nan
    logits, _ = pooling.forward(hidden, cu_seqlens, weight, tile=tile)
    assert torch.equal(logits, expected)


@LAYOUTS
def test_positions_are_as_narrow_as_the_bound_allows(tile):
    hidden, weight, cu_seqlens = random(0, 9, 16), random(1, 8, 16), bounds([4, 5], torch.int64)
    _, wide = pooling.forward(hidden, cu_seqlens, weight, None, True, tile=tile)
    _, narrow = pooling.forward(hidden, cu_seqlens, weight, None, True, max_length=5, tile=tile)
    assert wide.dtype == torch.int32
    assert narrow.dtype == torch.int16
    assert torch.equal(wide, narrow.int())
    assert argmax_dtype(32767) == torch.int16
    assert argmax_dtype(32768) == torch.int32


@pytest.mark.parametrize("layout", ["aligned", "packed"])
def test_a_false_bound_on_the_length_is_seen(layout):
    """Positions up to 32,767 fit; a later one must not come back as the position of another."""
    tile = PoolTile(layout, 16, 4096, 16, 2, 4, 2, descriptors=False)
    tile = tile if IS_INTERPRETED else dataclasses.replace(tile, block_t=128)
    hidden = torch.zeros((32_775, 16), device=DEVICE)
    weight = torch.eye(16, device=DEVICE)[:5]
    cu_seqlens = bounds([5, 32_770])
    last, beyond = 5 + 32_767, 5 + 32_768
    hidden[last, 0] = hidden[beyond, 1] = hidden[beyond, 2] = 1.0
    hidden[7, 2] = 2.0
    logits, argmax = pooling.forward(
        hidden, cu_seqlens, weight, None, True, max_length=32_767, tile=tile
    )
    assert argmax.dtype == torch.int16
    assert argmax.tolist() == [[0] * 5, [32_767, -1, 2, 0, 0]]
    assert logits[1].isnan().tolist() == [False, True, False, False, False]
    assert torch.equal(logits[1, [0, 2, 3, 4]].cpu(), torch.tensor([1.0, 2.0, 0.0, 0.0]))
    kept = select_topk(logits, 1, activation="elu1p")
    assert kept.columns.tolist() == [0, 1]
    assert kept.weights[1].isnan()
    right, wide = pooling.forward(hidden, cu_seqlens, weight, None, True, tile=tile)
    assert right.isfinite().all()
    assert wide[1].tolist() == [32_767, 32_768, 2, 0, 0]


@pytest.mark.skipif(not IS_INTERPRETED, reason="a device multiplies these precisions as they are")
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_precisions_run(precision):
    hidden, weight, cu_seqlens = random(0, 9, 16), random(1, 8, 16), bounds([9])
    logits, _ = pooling.forward(hidden, cu_seqlens, weight, precision=precision)
    assert torch.allclose(logits.double(), pool64(hidden, cu_seqlens, weight).logits, atol=1e-5)


def test_refuses_what_it_cannot_read():
    hidden, weight, cu_seqlens = random(0, 9, 16), random(1, 8, 16), bounds([9])
    with pytest.raises(ShapeError, match="share one of"):
        pooling.forward(hidden, cu_seqlens, weight.half())
    with pytest.raises(ShapeError, match="share one of"):
        pooling.forward(hidden.double(), cu_seqlens, weight.double())
    with pytest.raises(ConfigError, match="precision"):
        pooling.forward(hidden, cu_seqlens, weight, precision="fast")
    with pytest.raises(LookupError, match="no tile"):
        pool_tile(90, 64, 768, 30522, 100.0, descriptors=True, shared_memory=227 * 1024)
