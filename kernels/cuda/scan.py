"""Exact scores of the columns that a selection can keep, found by a scan in 8-bit integers.

Of V columns a selection keeps few. All are scored in integers, at twice the rate of bfloat16 and
with exact sums; what was rounded away bounds how far each score can be from the true one. Columns
that cannot be kept whatever the difference is are dropped, the others are computed in full.

With h a state, w a row, h' and w' what their integers stand for, u = 2^-24:

    |fp32(h . w) - h' . w'| <= |h| |w - w'| + |h - h'| |w'| + 2 H u |h| |w|

as on the CPU; the proof is in `docs/math.md`. Passes, none of which waits for the device:

1. states of each text to integers of one step, with the largest norms of its states and of what
   the integers miss;
2. the scan: `near` and `above` [B, V], what a score is by integers and what it keeps below;
3. true scores of the k best by `near`: the least of them is one that the k-th best reaches;
4. true scores of all others whose `above` is not below it.

Nothing is proved about results in other bits: rescored columns add their products in an order of
their own, the same one in every batch. Costs 2·T·V·H integer operations, a sum of 16 B·V bytes
between passes, and 2·L·H FLOP for each rescored column of a text of L tokens. Opt-in: no GPU has
shown yet that it is faster than `forward`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from vdr_db.errors import ConfigError, ShapeError
from vdr_db.kernels.activation import Activation, check_activation
from vdr_db.kernels.arguments import Lexical, check_pool
from vdr_db.kernels.cuda import scan_kernels
from vdr_db.kernels.cuda.configs import ANY, PoolTile, pool_tile
from vdr_db.kernels.cuda.primitives import (
    compute_capability,
    descriptor,
    is_interpreted,
    on_device,
    shared_memory,
    short_rows,
)
from vdr_db.kernels.cuda.scan_kernels import encode_states_kernel, rescore_kernel, scan_kernel
from vdr_db.kernels.cuda.topk import select_topk
from vdr_db.kernels.reference import text_of

__all__ = ["Codes", "encoded", "scan"]

# TINY covers what underflows, also where denormal numbers count as 0; TINY_NORM covers it in norms,
# whose squares underflow earlier.
LEVELS, UNIT = scan_kernels.LEVELS.value, scan_kernels.UNIT.value
TINY, TINY_NORM = scan_kernels.TINY.value, scan_kernels.TINY_NORM.value
WIDTH = 128
"""Rows of integers are filled up with zeros to a multiple of so many."""
SLACK = 1 + 2.0**-16  # for the rounding of sums that are themselves a bound
LARGEST_PRODUCT = 1e37  # no sum up to here overflows
ROWS_AT_ONCE = 8192
"""Rows that are float32 for a moment while a matrix is encoded."""
STATES_AT_ONCE = 4
"""Tokens that the program of a text encodes together."""


@dataclass(frozen=True)
class Codes:
    """A matrix in 8-bit integers, with what bounds the error of each row.

    Attributes:
        codes: `[V, H filled up]` int8.
        scales: `[V]` float32, like all that follow: what one step of a row's integers stands for.
        per_norm: `[V]`, error of a score for each unit of a state's norm.
        per_rest: `[V]`, error of a score for each unit of the norm of what a state's integers miss.
        per_score: `[V]`, error that every score has.
        bias: `[V]`, added to scores, or None.
        largest_norm: `[]`, of a row.
    """

    codes: Tensor
    scales: Tensor
    per_norm: Tensor
    per_rest: Tensor
    per_score: Tensor
    bias: Tensor | None
    largest_norm: Tensor


def encoded(weight: Tensor, bias: Tensor | None = None) -> Codes:
    """Codes of a matrix.

    Args:
        weight: `[V, H]` float, any strides.
        bias: `[V]` float, or None.
    """
    V, H = weight.shape
    width = triton.cdiv(H, WIDTH) * WIDTH
    codes = torch.zeros((V, width), dtype=torch.int8, device=weight.device)
    scales, norms, rests, kept = (
        torch.zeros(V, dtype=torch.float32, device=weight.device) for _ in range(4)
    )
    for first in range(0, V, ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        rows = weight[part].detach().to(torch.float32)
        is_finite = rows.isfinite().all(1)
        rows = torch.where(is_finite[:, None], rows, 0.0)
        scales[part] = scale = (rows.abs().amax(1) / LEVELS).clamp(min=TINY)
        integers = (rows / scale[:, None]).round().clamp(-LEVELS, LEVELS)
        codes[part, :H] = integers.to(torch.int8)
        integers *= scale[:, None]
        kept[part], norms[part] = _norms(integers), _norms(rows)
        rests[part] = torch.where(is_finite, _norms(rows - integers), torch.inf)
    per_score = torch.full_like(norms, TINY)
    if bias is not None:
        bias = bias.detach().to(torch.float32).contiguous()
        per_score += 16 * UNIT * bias.abs()
    return Codes(
        codes,
        scales,
        per_norm=SLACK * (rests + (2 * H + 64) * UNIT * norms) + TINY,
        per_rest=SLACK * kept + TINY,
        per_score=per_score,
        bias=bias,
        largest_norm=norms.amax() if V else norms.new_zeros(()),
    )


def scan(
    codes: Codes,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    activation: Activation,
    lexical: Lexical | None = None,
    precision: str | None = None,
    tile: PoolTile | None = None,
) -> Tensor:
    """Scores of all columns that a selection may keep, -inf for the others.

    Whatever `select_topk` makes of at most k columns of the result, joined with `lexical`: it is
    what it would make of all scores.

    Args:
        codes: `encoded(weight, bias)`.
        hidden: `[T, H]` bfloat16, float16 or float32, any strides.
        cu_seqlens: `[B + 1]` int32 or int64.
        weight: `[V, H]`, dtype and device of `hidden`, any strides.
        bias: `[V]` or None.
        k: How many columns are kept, at least 1.
        activation: Turns scores into weights; with all but `elu1p` only scores above 0 have one.
        lexical: Bounds `[B + 1]` and columns `[n]` whose score is wanted in any case, or None.
        precision: How float32 inputs multiply: `"tf32x3"` (default) or `"ieee"`; the bound does not
            hold for the short numbers of `"tf32"`.
        tile: Run with this tile instead of the table's.

    Returns:
        `logits` `[B, V]` float32.

    Raises:
        ShapeError: Sizes or dtypes disagree.
        ConfigError: `k`, `activation` or `precision` is unknown.
    """
    check_pool(hidden, cu_seqlens, weight, bias)
    check_activation(activation)
    precision = precision or "tf32x3"
    if precision not in ("tf32x3", "ieee"):
        raise ConfigError(
            f"`precision` of a scan must be 'tf32x3' or 'ieee', got {precision!r}; pass one."
        )
    T, V, B = hidden.shape[0], weight.shape[0], cu_seqlens.shape[0] - 1
    if codes.codes.shape[0] != V or codes.codes.shape[1] < hidden.shape[1]:
        raise ShapeError(
            f"`codes` must be of `weight` {tuple(weight.shape)}, got a matrix of "
            f"{tuple(codes.codes.shape)}; pass encoded(weight, bias)."
        )
    if not 1 <= k <= V:
        raise ConfigError(f"`k` must lie between 1 and {V}, got {k}; use `forward` to keep all.")
    logits = torch.full((B, V), -torch.inf, dtype=torch.float32, device=hidden.device)
    if B == 0 or T == 0:
        return logits
    hidden, weight, cu_seqlens = short_rows(hidden), short_rows(weight), cu_seqlens.contiguous()
    bias = None if bias is None else bias.contiguous()
    with on_device(hidden):
        near, above = _bounds(codes, hidden, cu_seqlens, tile)
        least = torch.full((B,), -torch.inf, device=hidden.device)
        if activation != "elu1p":
            least.zero_()
            near.masked_fill_(above < 0, -torch.inf)
        inputs = (hidden, weight, bias, cu_seqlens)
        best = select_topk(near, k, activation="elu1p", trim=False)
        _rescore(*inputs, best.indptr, best.columns, logits, precision)
        is_scored = logits != -torch.inf
        reached = torch.where(is_scored, logits, torch.inf).amin(1)
        least = torch.where(is_scored.sum(1) < k, least, torch.maximum(least, reached))
        # Written with `not below`, so that NaN is never dropped.
        is_left = ~((above < least[:, None]) | is_scored)
        if lexical is not None:
            texts = text_of(lexical[0], lexical[1].shape[0])
            is_left[texts, lexical[1].long()] = True
        left = torch.where(is_left, 1.0, -torch.inf)
        rest = select_topk(left, None, activation="none", trim=False)
        _rescore(*inputs, rest.indptr, rest.columns, logits, precision)
    return logits


def _bounds(
    codes: Codes, hidden: Tensor, cu_seqlens: Tensor, tile: PoolTile | None
) -> tuple[Tensor, Tensor]:
    """Score of each column by integers, and a bound that its true score keeps below."""
    (T, H), (V, width), B = hidden.shape, codes.codes.shape, cu_seqlens.shape[0] - 1
    tile = tile or _tile(hidden, V, 8)
    states = torch.empty((T, width), dtype=torch.int8, device=hidden.device)
    steps, norms, rests = torch.empty((3, B), dtype=torch.float32, device=hidden.device)
    encode_states_kernel[(B,)](
        *(hidden, cu_seqlens, states, steps, norms, rests, *hidden.stride()),
        H=H,
        WIDTH=width,
        BLOCK_T=STATES_AT_ONCE,
        BLOCK_H=triton.next_power_of_2(width),
        enable_fp_fusion=True,
    )
    # sums of such numbers may overflow: their bound is none
    norms = torch.where(norms * codes.largest_norm < LARGEST_PRODUCT, norms, torch.inf)
    near, above = torch.empty((2, B, V), dtype=torch.float32, device=hidden.device)
    integers = states, codes.codes
    if tile.descriptors:
        rows = tile.block_t, tile.block_v
        integers = tuple(
            descriptor(x, n, tile.block_k) for x, n in zip(integers, rows, strict=True)
        )
    scan_kernel[(B * triton.cdiv(V, tile.block_v),)](
        *(*integers, cu_seqlens, codes.scales, codes.per_norm, codes.per_rest, codes.per_score),
        *(codes.bias, steps, norms, rests, near, above, B, V),
        WIDTH=width,
        BLOCK_V=tile.block_v,
        BLOCK_T=tile.block_t,
        BLOCK_K=tile.block_k,
        GROUP=tile.group,
        DESCRIPTORS=tile.descriptors,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.registers,
        enable_fp_fusion=True,
    )
    return near, above


def _rescore(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    indptr: Tensor,
    columns: Tensor,
    logits: Tensor,
    precision: str,
) -> None:
    """Writes the true scores of listed columns."""
    B, V = logits.shape
    tile = _tile(hidden, V, hidden.element_size() * 8)
    rescore_kernel[(B * triton.cdiv(V, tile.block_v),)](
        *(hidden, weight, bias, cu_seqlens, indptr, columns, logits, V),
        *(*hidden.stride(), *weight.stride()),
        H=hidden.shape[1],
        BLOCK_V=tile.block_v,
        BLOCK_T=tile.block_t,
        BLOCK_K=tile.block_k,
        UPCAST=hidden.dtype == torch.bfloat16 and is_interpreted(rescore_kernel),
        PRECISION=precision,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.registers,
        enable_fp_fusion=True,
    )


def _tile(hidden: Tensor, V: int, bits: int) -> PoolTile:
    """Tile of the scan (8 bits), or for rows that lie anywhere."""
    return pool_tile(
        compute_capability(hidden),
        bits,
        hidden.shape[1],
        V,
        ANY,
        descriptors=bits == 8,
        shared_memory=shared_memory(hidden),
    )


def _norms(rows: Tensor) -> Tensor:
    """Norms of rows, rounded up: none is below the true one."""
    norms: Tensor = rows.square().sum(1).sqrt() * (1 + (rows.shape[1] + 64) * UNIT) + TINY_NORM
    return norms
