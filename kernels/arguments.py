"""Checks of what callers hand to the kernels, shared by every implementation.

Sizes and dtypes are checked everywhere. Values (does `cu_seqlens` end at T?) are checked where the
tensor lies in main memory: on a device that would make the host wait for it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from vdr_db.errors import ConfigError, ShapeError

__all__ = ["argmax_dtype", "check_kept", "check_pool", "check_selection", "document_bounds"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)

Lexical = tuple[Tensor, Tensor]

INT16_POSITIONS = 32767
"""Longest document, in tokens, whose positions fit int16."""


def argmax_dtype(max_length: int | None) -> torch.dtype:
    """Smallest dtype for positions in documents of at most `max_length` tokens (None: any)."""
    is_short = max_length is not None and max_length <= INT16_POSITIONS
    return torch.int16 if is_short else torch.int32


def check_pool(hidden: Tensor, cu_seqlens: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuses inputs of `project_pool` whose sizes, dtypes or devices disagree.

    Raises:
        ShapeError: They do.
    """
    if hidden.dim() != 2 or hidden.dtype not in FLOATS:
        raise ShapeError(
            f"`hidden` must be [T, H] and of a float dtype, got {describe(hidden)}; "
            "pack the tokens of all documents into one axis."
        )
    if weight.dim() != 2 or weight.dtype not in FLOATS or 0 in weight.shape:
        raise ShapeError(
            f"`weight` must be [V, H] with V and H of at least 1 and of a float dtype, "
            f"got {describe(weight)}."
        )
    if hidden.shape[1] != weight.shape[1]:
        raise ShapeError(
            f"`hidden` and `weight` must agree in H, got {describe(hidden)} and {describe(weight)}."
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in INTEGERS or cu_seqlens.shape[0] == 0:
        raise ShapeError(
            f"`cu_seqlens` must be [B + 1] and int32 or int64, got {describe(cu_seqlens)}; "
            "an empty batch is [0]."
        )
    V = weight.shape[0]
    if bias is not None and (bias.shape != (V,) or bias.dtype not in FLOATS):
        raise ShapeError(
            f"`bias` must be [V] = [{V}] and of a float dtype, got {describe(bias)}; "
            "slice it together with `weight`."
        )
    check_devices(hidden, cu_seqlens, weight, bias)


def check_devices(*tensors: Tensor | None) -> None:
    """Refuses tensors that lie on several devices.

    Raises:
        ShapeError: They do.
    """
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ShapeError(
            f"all tensors must be on one device, got {sorted(devices)}; move them first."
        )


def check_kept(
    logits: Tensor,
    argmax: Tensor,
    indptr: Tensor,
    columns: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
) -> None:
    """Refuses a selection that does not belong to what was pooled.

    Raises:
        ShapeError: Sizes, dtypes or devices disagree.
    """
    B, V = cu_seqlens.shape[0] - 1, weight.shape[0]
    if logits.shape != (B, V) or logits.dtype not in (torch.float32, torch.float64):
        raise ShapeError(
            f"pooled logits must be [B, V] = [{B}, {V}] and float32 or float64, got "
            f"{describe(logits)}; pass them as they were pooled."
        )
    if argmax.shape != (B, V) or argmax.dtype not in (torch.int16, torch.int32):
        raise ShapeError(
            f"the argmax must be [B, V] = [{B}, {V}] and int16 or int32, got {describe(argmax)}; "
            "pool with `return_argmax=True`."
        )
    check_csr("(`indptr`, `columns`)", indptr, columns, B)
    check_devices(logits, argmax, indptr, columns, weight)


def check_csr(name: str, indptr: Tensor, columns: Tensor, B: int) -> None:
    """Refuses a selection of B rows whose sizes or dtypes are wrong.

    Raises:
        ShapeError: They are.
    """
    is_csr = indptr.shape == (B + 1,) and columns.dim() == 1
    if not is_csr or indptr.dtype not in INTEGERS or columns.dtype not in INTEGERS:
        raise ShapeError(
            f"{name} must be (indptr [B + 1] = [{B + 1}], columns [n]), both int32 or int64, "
            f"got {describe(indptr)} and {describe(columns)}; take them of one selection."
        )


def document_bounds(cu_seqlens: Tensor, T: int, max_length: int | None = None) -> list[int]:
    """First token of each document, and T, as Python integers.

    Args:
        cu_seqlens: `[B + 1]`, int32 or int64; waits for its device.
        T: Number of tokens.
        max_length: Longest document there may be, or None.

    Returns:
        B + 1 integers that start at 0, never fall, and end at T.

    Raises:
        ShapeError: `cu_seqlens` does not hold such integers, or a document is too long.
    """
    bounds: list[int] = cu_seqlens.tolist()
    falls = any(last > first for last, first in itertools.pairwise(bounds))
    if bounds[0] != 0 or bounds[-1] != T or falls:
        raise ShapeError(
            f"`cu_seqlens` must start at 0, never fall and end at T = {T}, "
            f"got {bounds[:4]}...{bounds[-1]}; it is the running sum of the document lengths."
        )
    if max_length is not None:
        longest = max((end - start for start, end in itertools.pairwise(bounds)), default=0)
        if longest > max_length:
            raise ShapeError(
                f"`max_length` must be at least the longest document's {longest} tokens, got "
                f"{max_length}; pass a true bound, or None."
            )
    return bounds


def check_selection(logits: Tensor, k: int | None, lexical: Lexical | None) -> None:
    """Refuses inputs of `select_topk` that cannot be used.

    Raises:
        ConfigError: `k` is not None and not an integer in [1, V].
        ShapeError: Sizes or dtypes disagree, or a lexical column is not in [0, V).
    """
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.float64):
        raise ShapeError(
            f"`logits` must be [B, V] and float32 or float64, got {describe(logits)}; "
            "half precision makes ties, so keep the logits as they were pooled."
        )
    B, V = logits.shape
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= V):
        raise ConfigError(
            f"`k` must be an integer from 1 to V = {V}, or None to keep all columns, got {k!r}."
        )
    if lexical is None:
        return
    indptr, columns = lexical
    check_csr("`lexical`", indptr, columns, B)
    check_devices(logits, indptr, columns)
    if logits.device.type != "cpu":
        return
    document_bounds(indptr, columns.shape[0])
    if columns.numel() and not (int(columns.min()) >= 0 and int(columns.max()) < V):
        raise ShapeError(
            f"`lexical` columns must be in [0, V = {V}), "
            f"got {int(columns.min())} to {int(columns.max())}; are these token ids, not columns?"
        )


def describe(tensor: Tensor) -> str:
    """Shape and dtype, as error messages show them."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
