"""Device code of the selection; `topk` says how the passes fit together.

Logits are compared as ordered int32 keys (see `primitives`), so equal numbers are equal keys, NaN
is the largest key. Rows and parts are padded with the key of -inf, which is never kept.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# Device functions take what Triton traces; annotations on them would mean constants.

from __future__ import annotations

import triton
import triton.language as tl

from vdr_db.kernels.cuda.primitives import (
    SIZES,
    activated,
    largest_of_zero,
    ordered_key,
    value_of_key,
)


@triton.jit
def load_keys(row_ptr, first, n, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """Keys of a block of a row that holds logits, or keys already; past its end the key of -inf.

    So nothing needs a mask after the load: masks cost registers.
    """
    offs = first + tl.arange(0, BLOCK)
    if KEYS:
        return tl.load(row_ptr + offs, mask=offs < n, other=-0x7F800001)
    return ordered_key(tl.load(row_ptr + offs, mask=offs < n, other=float("-inf")))


@triton.jit
def tail_height(count, n):
    """Square root of the binary logarithm of 2n / count: about linear in a normal logit."""
    return tl.sqrt(tl.log2(2.0 * n / tl.maximum(count.to(tl.float32), 0.5)))


@triton.jit
def moments(keys):
    """(NaNs, sum, sum of squares) of keys, as vectors; only finite logits are summed."""
    is_finite = (keys > -0x7F800001) & (keys < 0x7F800000)
    value = tl.where(is_finite, value_of_key(keys), 0.0)
    return (keys == 0x7FFFFFFF).to(tl.int32), value, value * value


@triton.jit
def kth_largest(
    keys, row_ptr, n, k, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, KEYS: tl.constexpr
):
    """A key with at least k keys as large, how many there are, and the turns that it took.

    It is the k-th largest key, unless the search met a smaller number that exactly k keys reach.
    Secants through the counts of two numbers guess the next one, from mean and deviation on. Where
    they leave the bounds, and from the ninth turn on (ties, far outliers), bounds are halved.
    """
    if ONE_BLOCK:
        nans, value, square = moments(keys)
    else:
        nans = tl.zeros((BLOCK,), tl.int32)
        value = tl.zeros((BLOCK,), tl.float32)
        square = tl.zeros((BLOCK,), tl.float32)
        for first in tl.range(0, n, BLOCK):
            more_nans, more, more_square = moments(load_keys(row_ptr, first, n, BLOCK, KEYS))
            nans += more_nans
            value += more
            square += more_square
    reached = tl.sum(nans, 0)  # before the others: with all three in flight registers spill
    size = n.to(tl.float32)
    before = tl.sum(value, 0) / size
    spread = tl.sqrt(tl.maximum(tl.sum(square, 0) / size - before * before, 0.0))
    # of a normal number 1/2 lie above the mean, 0.0228 above two deviations
    height_before = tl.full((), 1.4142135, tl.float32)
    point = before + 2.0 * spread
    height = tl.full((), 2.5413, tl.float32)
    wanted = tail_height(k, size)

    threshold = tl.full((), -0x7F800001, tl.int32)  # -inf, which every logit reaches
    limit = tl.full((), 0x7FFFFFFF, tl.int32)  # a key that fewer than k reach
    if reached >= k:
        threshold = limit
    else:
        reached = n
    turns = tl.full((), 0, tl.int32)
    while threshold < limit - 1:
        rise = height - height_before
        slope = (point - before) / tl.where(rise == 0.0, 1e-30, rise)
        candidate = ordered_key(point + (wanted - height) * slope)
        if (candidate <= threshold) | (candidate >= limit) | (turns >= 8):
            candidate = (threshold & limit) + ((threshold ^ limit) >> 1)
        if ONE_BLOCK:
            count = tl.sum((keys >= candidate).to(tl.int32), 0)
        else:
            counts = tl.zeros((BLOCK,), tl.int32)
            for first in tl.range(0, n, BLOCK):
                counts += (load_keys(row_ptr, first, n, BLOCK, KEYS) >= candidate).to(tl.int32)
            count = tl.sum(counts, 0)
        if count >= k:
            threshold = candidate
            reached = count
        else:
            limit = candidate
        if count == k:
            limit = candidate
        before = point
        height_before = height
        point = value_of_key(candidate)
        height = tail_height(count, size)
        turns += 1
    return threshold, reached, turns


@triton.jit(do_not_specialize=SIZES)
def row_threshold_kernel(
    source_ptr,
    logits_ptr,
    limits_ptr,
    n,
    V,
    k,
    stride_source,
    stride_logits,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """limits[row] = (threshold key, last column at which a key equal to it is still taken)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = source_ptr + row * stride_source
    keys = load_keys(row_ptr, 0, n, BLOCK, KEYS)
    threshold, reached, _ = kth_largest(keys, row_ptr, n, k, BLOCK, ONE_BLOCK, KEYS)
    cut = tl.full((), 0x7FFFFFFF, tl.int32)
    # too many reach it: the smallest columns win. Ties of -inf need no cut, they are never kept
    if (reached > k) & (threshold > -0x7F800001):
        if ONE_BLOCK:
            above = tl.sum((keys > threshold).to(tl.int32), 0)
        else:
            counts = tl.zeros((BLOCK,), tl.int32)
            for first in tl.range(0, n, BLOCK):
                counts += (load_keys(row_ptr, first, n, BLOCK, KEYS) > threshold).to(tl.int32)
            above = tl.sum(counts, 0)
        wanted = k - above
        column = 0
        while column < V:
            scanned = load_keys(logits_ptr + row * stride_logits, column, V, SCAN, False)
            ties = (scanned == threshold).to(tl.int32)
            is_last = (tl.cumsum(ties, 0) == wanted) & (ties == 1)
            offs = column + tl.arange(0, SCAN)
            cut = tl.min(tl.where(is_last, offs, 0x7FFFFFFF), 0)
            wanted -= tl.sum(ties, 0)
            if wanted <= 0:
                column = V
            else:
                column += SCAN
    tl.store(limits_ptr + 2 * row, threshold)
    tl.store(limits_ptr + 2 * row + 1, cut)


@triton.jit(do_not_specialize=SIZES)
def part_candidates_kernel(
    logits_ptr,
    candidates_ptr,
    V,
    n_parts,
    n_kept,
    stride_logits,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    """The `n_kept` largest keys of each part of a row, in no particular order."""
    row = (tl.program_id(0) // n_parts).to(tl.int64)
    first = tl.program_id(0) % n_parts * BLOCK
    # offsets from the part on are constants of a thread; from the row on each takes registers
    part_ptr = logits_ptr + (row * stride_logits + first)
    n = tl.minimum(V - first, BLOCK)
    keys = load_keys(part_ptr, 0, n, BLOCK, False)
    threshold, _, _ = kth_largest(keys, part_ptr, n, n_kept, BLOCK, True, False)
    above = tl.sum((keys > threshold).to(tl.int32), 0)
    output_ptr = candidates_ptr + tl.program_id(0).to(tl.int64) * n_kept
    next_above = tl.full((), 0, tl.int32)
    next_equal = above
    for step in tl.range(0, BLOCK, SCAN):
        scanned = load_keys(part_ptr, step, n, SCAN, False)
        is_above = (scanned > threshold).to(tl.int32)
        is_equal = (scanned == threshold).to(tl.int32)
        place = tl.where(
            is_above == 1,
            next_above + tl.cumsum(is_above, 0) - 1,
            next_equal + tl.cumsum(is_equal, 0) - 1,
        )
        is_kept = (is_above + is_equal == 1) & (place < n_kept)
        tl.store(output_ptr + place, scanned, mask=is_kept)
        next_above += tl.sum(is_above, 0)
        next_equal += tl.sum(is_equal, 0)


@triton.jit(do_not_specialize=SIZES)
def mark_lexical_kernel(columns_ptr, text_ptr, bits_ptr, n, n_words, BLOCK: tl.constexpr):
    """Sets bit v of bits[b] for every column v that text b keeps in any case."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < n
    column = tl.load(columns_ptr + entry, mask=inside, other=0).to(tl.int32)
    text = tl.load(text_ptr + entry, mask=inside, other=0).to(tl.int64)
    bit = tl.full((BLOCK,), 1, tl.int32) << (column % 32)
    tl.atomic_or(bits_ptr + text * n_words + column // 32, bit, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def keep_kernel(
    logits_ptr,
    limits_ptr,
    bits_ptr,
    counts_ptr,
    ends_ptr,
    columns_ptr,
    weights_ptr,
    V,
    n_chunks,
    n_words,
    stride_logits,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Kept columns of a chunk of a row: their number or, if ends of chunks are known, themselves.

    Without `limits` all are kept, without `bits` none in any case. Columns ascend. Only what is
    kept goes through the activation: logits are written first, close together.
    """
    row = (tl.program_id(0) // n_chunks).to(tl.int64)
    offs = tl.program_id(0) % n_chunks * CHUNK + tl.arange(0, CHUNK)
    inside = offs < V
    logits = tl.load(logits_ptr + row * stride_logits + offs, mask=inside, other=float("-inf"))
    is_kept = inside & (logits != float("-inf"))
    if limits_ptr is not None:
        key = ordered_key(logits)
        threshold = tl.load(limits_ptr + 2 * row)
        cut = tl.load(limits_ptr + 2 * row + 1)
        is_taken = (key > threshold) | ((key == threshold) & (offs <= cut))
        if bits_ptr is not None:
            words = tl.load(bits_ptr + row * n_words + offs // 32, mask=inside, other=0)
            is_taken |= ((words >> (offs % 32)) & 1) == 1
        is_kept &= is_taken
    # written so that NaN is kept: it must surface
    is_kept = (is_kept & ((logits <= largest_of_zero(ACTIVATION)) == 0)).to(tl.int32)
    if ends_ptr is None:
        tl.store(counts_ptr + tl.program_id(0), tl.sum(is_kept, 0))
    else:
        end = tl.load(ends_ptr + tl.program_id(0))
        first = end - tl.sum(is_kept, 0)
        place = first + tl.cumsum(is_kept, 0) - 1
        tl.store(columns_ptr + place, offs, mask=is_kept == 1)
        tl.store(weights_ptr + place, logits, mask=is_kept == 1)
        tl.debug_barrier()  # other threads' logits are read
        for kept in tl.range(first, end, STEP):
            pointers = weights_ptr + kept + tl.arange(0, STEP)
            is_written = kept + tl.arange(0, STEP) < end
            weights = activated(tl.load(pointers, mask=is_written, other=0.0), ACTIVATION)
            # the fast exponential may lose the last subnormal number
            weights = tl.where(weights == 0.0, 1.401298464324817e-45, weights)
            tl.store(pointers, weights, mask=is_written)
