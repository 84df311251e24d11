"""Triton projection and max pooling: the host side of forward and both gradients.

```
logits[b, v] = max over tokens l of text b of  hidden[cu_seqlens[b] + l] . weight[v]   (+ bias[v])
```

`hidden` [T, H] and `weight` [V, H] are bfloat16, float16 or float32; sums are float32. Forward
reads both matrices, writes `logits` [B, V] float32 and, on request, `argmax` [B, V]; the products
are never stored. It costs 2·T·V·H FLOP. With argmax, packed tiles hold one 8-byte key per
(text, dimension) besides.

Bits do not depend on the run, on neighbours in the batch or on padding: the sum over H has one
fixed order, and a maximum is exact in any order. Gradients repeat too (`backward`).

Rules: a text without tokens gives -inf and argmax -1; NaN wins every maximum; -0 becomes +0; the
lowest token wins ties; tokens behind cu_seqlens[B] take no part, so that buffers may be longer. A
position that does not fit int16, because `max_length` was no bound, turns its logit into NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from vdr_db.errors import ConfigError, ShapeError
from vdr_db.kernels.arguments import argmax_dtype, check_pool
from vdr_db.kernels.cuda.backward import backward, backward_sparse
from vdr_db.kernels.cuda.configs import PoolTile, pool_tile
from vdr_db.kernels.cuda.forward_kernels import (
    pool_aligned_kernel,
    pool_finish_kernel,
    pool_packed_kernel,
    search_kernel,
)
from vdr_db.kernels.cuda.primitives import (
    FIRST_KEY,
    compute_capability,
    descriptor,
    fits_descriptor,
    is_interpreted,
    on_device,
    shared_memory,
    short_rows,
)
from vdr_db.kernels.cuda.topk import select_topk
from vdr_db.kernels.reference import text_of

__all__ = ["backward", "backward_sparse", "forward", "select_topk", "takes_persistent"]

FINISH_BLOCK = 1024
"""Logits per program of the pass that turns keys into logits: enough for full-width accesses."""

SEARCH_BLOCK, SEARCH_STEP, SEARCH_REGISTERS = 128, 32, 128
"""Columns and hidden dimensions at a time, and registers, of the search for infinite maxima."""


def forward(
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    need_argmax: bool = False,
    *,
    max_length: int | None = None,
    precision: str | None = None,
    tile: PoolTile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`vdr_db.kernels.project_pool`, which documents arguments, for tensors on a device.

    Args:
        hidden: `[T, H]` bfloat16, float16 or float32, any strides.
        cu_seqlens: `[B + 1]` int32 or int64, any stride.
        weight: `[V, H]`, dtype and device of `hidden`, any strides.
        bias: `[V]` or None, any float dtype, any stride.
        need_argmax: Also return token positions, which the gradient needs.
        max_length: Bound on tokens per text, or None.
        precision: How float32 inputs multiply: `"tf32x3"` (default, about float32 accuracy),
            `"ieee"` (exact float32 products, much slower) or `"tf32"` (10-bit mantissa).
        tile: Run with this tile instead of the table's.

    Returns:
        `logits` `[B, V]` float32, and `argmax` `[B, V]` int16 or int32 or None.

    Raises:
        ShapeError: Sizes or dtypes disagree.
        ConfigError: `precision` is unknown, or a persistent tile cannot run here.
    """
    check_pool(hidden, cu_seqlens, weight, bias)
    _check(hidden, weight)
    precision = precision or "tf32x3"
    if precision not in ("ieee", "tf32", "tf32x3"):
        raise ConfigError(
            f"`precision` must be 'ieee', 'tf32' or 'tf32x3', got {precision!r}; pass one of these."
        )
    T, V, B = hidden.shape[0], weight.shape[0], cu_seqlens.shape[0] - 1
    logits = torch.empty((B, V), dtype=torch.float32, device=hidden.device)
    argmax = (
        torch.empty((B, V), dtype=argmax_dtype(max_length), device=hidden.device)
        if need_argmax
        else None
    )
    if B == 0 or V == 0:
        return logits, argmax
    if T == 0:
        logits.fill_(float("-inf"))
        return logits, None if argmax is None else argmax.fill_(-1)

    hidden, weight = short_rows(hidden), short_rows(weight)
    # Kernels walk vectors by one: a copy of a few, not a stride in every kernel.
    cu_seqlens, bias = cu_seqlens.contiguous(), None if bias is None else bias.contiguous()
    tile = tile or _tile(hidden, weight, B, precision)
    shared = _shared_arguments(hidden, weight, tile, precision) | {
        "cu_seqlens_ptr": cu_seqlens,
        "B": B,
        "NEED_ARGMAX": need_argmax,
    }
    outputs = {"bias_ptr": bias, "logits_ptr": logits, "argmax_ptr": argmax}
    with on_device(hidden):
        if tile.layout == "persistent":
            _check_persistent(hidden, weight)
            from vdr_db.kernels.cuda import persistent  # Gluon, which changes between versions

            persistent.launch(hidden, weight, bias, cu_seqlens, logits, argmax, tile)
        elif tile.layout == "aligned":
            pool_aligned_kernel[(B * triton.cdiv(V, tile.block_v),)](**outputs, **shared)
        else:
            n_tiles = triton.cdiv(T, tile.block_t)
            if argmax is None:
                keys = logits.view(torch.int32).fill_(-(2**31))
            else:
                keys = torch.full_like(logits, FIRST_KEY, dtype=torch.int64)
            pool_packed_kernel[(n_tiles * triton.cdiv(V, tile.block_v),)](
                first_text_ptr=text_of(cu_seqlens, n_tiles, step=tile.block_t, out_int32=True),
                keys_ptr=keys,
                **shared,
            )
            pool_finish_kernel[(B * triton.cdiv(V, FINISH_BLOCK),)](
                keys, V=V, BLOCK=FINISH_BLOCK, enable_fp_fusion=True, **outputs
            )
        if argmax is not None:
            search_kernel[(B * triton.cdiv(V, SEARCH_BLOCK),)](
                *(hidden, weight, cu_seqlens, logits, argmax, V),
                *(*hidden.stride(), *weight.stride()),
                H=hidden.shape[1],
                BLOCK_V=SEARCH_BLOCK,
                BLOCK_K=SEARCH_STEP,
                maxnreg=SEARCH_REGISTERS,
                enable_fp_fusion=True,
            )
    return logits, argmax


def _check(hidden: Tensor, weight: Tensor) -> None:
    """Refuses dtypes and sizes the kernels do not know; `arguments` has checked the rest."""
    known = (torch.bfloat16, torch.float16, torch.float32)
    if hidden.dtype != weight.dtype or hidden.dtype not in known:
        raise ShapeError(
            "`hidden` and `weight` must share one of bfloat16, float16, float32, got "
            f"{hidden.dtype} and {weight.dtype}; cast one of them."
        )
    if hidden.shape[0] >= 2**31:
        raise ShapeError(
            f"`hidden` must have fewer than 2**31 tokens, got {hidden.shape[0]}; split the batch."
        )


def takes_persistent(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the persistent forward knows the inputs, their device, and this version of Triton."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return (
        not is_interpreted(pool_aligned_kernel)
        and version >= (3, 7)
        and compute_capability(hidden) == 90
        and hidden.element_size() == 2
        and fits_descriptor(hidden)
        and fits_descriptor(weight)
    )


def _check_persistent(hidden: Tensor, weight: Tensor) -> None:
    """Refuses what `takes_persistent` does not take."""
    if not takes_persistent(hidden, weight):
        raise ConfigError(
            "a persistent tile needs Triton 3.7 or newer, a device of sm_90, and 16-bit inputs "
            f"with rows at multiples of 16 bytes, got Triton {triton.__version__}, "
            f"sm_{compute_capability(hidden)} and {hidden.dtype}; leave `tile` to the table."
        )


def _tile(hidden: Tensor, weight: Tensor, B: int, precision: str) -> PoolTile:
    """The table's tile, small for exact float32 products: they run outside the matrix unit."""
    bits = hidden.element_size() * 8
    exact = bits == 32 and precision == "ieee"
    return pool_tile(
        80 if exact else compute_capability(hidden),
        bits,
        hidden.shape[1],
        weight.shape[0],
        hidden.shape[0] / B,
        descriptors=fits_descriptor(hidden) and fits_descriptor(weight),
        shared_memory=shared_memory(hidden),
    )


def _shared_arguments(
    hidden: Tensor, weight: Tensor, tile: PoolTile, precision: str
) -> dict[str, Any]:
    """Arguments that both layouts take."""
    use_descriptors = tile.descriptors and fits_descriptor(hidden) and fits_descriptor(weight)
    interpreted_bfloat16 = hidden.dtype == torch.bfloat16 and is_interpreted(pool_aligned_kernel)
    return {
        "hidden": descriptor(hidden, tile.block_t, tile.block_k) if use_descriptors else hidden,
        "weight": descriptor(weight, tile.block_v, tile.block_k) if use_descriptors else weight,
        "T": hidden.shape[0],
        "V": weight.shape[0],
        "stride_hidden_t": hidden.stride(0),
        "stride_hidden_h": hidden.stride(1),
        "stride_weight_v": weight.stride(0),
        "stride_weight_h": weight.stride(1),
        "H": hidden.shape[1],
        "BLOCK_V": tile.block_v,
        "BLOCK_T": tile.block_t,
        "BLOCK_K": tile.block_k,
        "GROUP": tile.group,
        "DESCRIPTORS": use_descriptors,
        "UPCAST": interpreted_bfloat16,
        "PRECISION": precision,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": tile.registers,
        "enable_fp_fusion": True,
    }
