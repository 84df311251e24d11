"""Gradients of the projection and max pooling, deterministic, for all entries and for kept ones.

With a[b, v] the packed token that reached the maximum and g the gradient of the logits:

```
grad_weight[v] = sum over b of g[b, v] * hidden[a[b, v]]
grad_hidden[t] = sum over (b, v) with a[b, v] = t of g[b, v] * weight[v]
grad_bias[v]   = sum over b of g[b, v]
```

`backward` takes g for all entries [B, V]. Long texts gather rows: 2·B·V·H FLOP, about B·V·H
elements read per gradient, lists of B·V int32 and (V / chunk)·T int32 besides. Short texts multiply
one-hot tiles on the matrix unit: 2·T·V·H FLOP, no lists; g is rounded to the input dtype there, as
eager autograd does. `backward_sparse` takes g for nnz kept entries only: B·k instead of B·V rows.

Each row of an output has one owner and one order of addition: results repeat bit for bit. Texts
without tokens get and give nothing. Outputs have the dtype of what they are gradients of (bias:
float32).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdr_db.errors import ConfigError, ShapeError
from vdr_db.kernels.cuda.backward_launches import (
    launch_bias,
    launch_hidden_gather,
    launch_hidden_onehot,
    launch_weight_gather,
    launch_weight_kept,
    launch_weight_onehot,
)
from vdr_db.kernels.cuda.configs import BackwardTiles, backward_tiles
from vdr_db.kernels.cuda.entry_lists import entries_by_column, text_of_each
from vdr_db.kernels.cuda.primitives import compute_capability, on_device, short_rows

__all__ = ["backward", "backward_sparse"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def backward(
    grad_logits: Tensor,
    argmax: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    need_hidden: bool = True,
    need_weight: bool = True,
    need_bias: bool = False,
    *,
    method: str | None = None,
    tiles: BackwardTiles | None = None,
) -> Gradients:
    """Gradients from the gradient of all logits.

    Args:
        grad_logits: `[B, V]`, any float dtype.
        argmax: `[B, V]` int16 or int32, as `forward` returns it.
        hidden: `[T, H]`, as given to `forward`.
        cu_seqlens: `[B + 1]`, as given to `forward`.
        weight: `[V, H]`, as given to `forward`.
        need_hidden: Compute the gradient of `hidden`.
        need_weight: Compute the gradient of `weight`.
        need_bias: Compute the gradient of the bias.
        method: `"gather"` or `"onehot"`; by default the mean length decides.
        tiles: Run with these tiles instead of the table's.

    Returns:
        Gradients of hidden `[T, H]`, weight `[V, H]` and bias `[V]` float32; None where not needed.

    Raises:
        ConfigError: `method` is unknown.
        ShapeError: Sizes disagree.
    """
    if method not in (None, "gather", "onehot"):
        raise ConfigError(
            f"`method` must be 'gather' or 'onehot', got {method!r}; pass one of these."
        )
    T, V, B = hidden.shape[0], weight.shape[0], cu_seqlens.shape[0] - 1
    if grad_logits.shape != (B, V) or argmax.shape != (B, V):
        raise ShapeError(
            f"`grad_logits` and `argmax` must be [B, V] = ({B}, {V}), got "
            f"{tuple(grad_logits.shape)} and {tuple(argmax.shape)}; "
            "pass the gradient and the argmax of one forward call."
        )
    tiles = tiles or _tiles(hidden)
    outputs = _outputs(hidden, weight, need_hidden, need_weight, need_bias)
    grad_hidden, grad_weight, grad_bias = outputs
    if T == 0 or B == 0 or V == 0:
        return _zeroed(outputs)
    grad, argmax = grad_logits.to(torch.float32).contiguous(), argmax.contiguous()
    hidden, weight = short_rows(hidden), short_rows(weight)
    cu_seqlens = cu_seqlens.contiguous()
    use_onehot = method == "onehot" or (method is None and tiles.onehot_length >= T / B)
    with on_device(hidden):
        if use_onehot and (need_hidden or need_weight):
            texts = text_of_each(cu_seqlens, T)
            if grad_weight is not None:
                launch_weight_onehot(grad, argmax, hidden, cu_seqlens, texts, grad_weight, tiles)
            if grad_hidden is not None:
                launch_hidden_onehot(grad, argmax, cu_seqlens, texts, weight, grad_hidden, tiles)
        else:
            if grad_weight is not None:
                launch_weight_gather(grad, argmax, hidden, cu_seqlens, grad_weight, tiles)
            if grad_hidden is not None:
                launch_hidden_gather(
                    grad, None, None, None, argmax, cu_seqlens, weight, grad_hidden, tiles
                )
        if grad_bias is not None:
            launch_bias(grad, argmax, grad_bias)
    return outputs


def backward_sparse(
    grad_values: Tensor,
    indptr: Tensor,
    columns: Tensor,
    argmax_at_kept: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    need_hidden: bool = True,
    need_weight: bool = True,
    need_bias: bool = False,
    *,
    tiles: BackwardTiles | None = None,
) -> Gradients:
    """Gradients from the gradient of kept logits only.

    Args:
        grad_values: `[nnz]`, any float dtype: gradient of the logit of each kept entry.
        indptr: `[B + 1]` int32 or int64: text b keeps entries indptr[b] to indptr[b + 1].
        columns: `[nnz]` integer, unique within a text.
        argmax_at_kept: `[nnz]` int16 or int32: position within the text of each entry's maximum.
        hidden: `[T, H]`, as given to `forward`.
        cu_seqlens: `[B + 1]`, as given to `forward`.
        weight: `[V, H]`, as given to `forward`.
        need_hidden: Compute the gradient of `hidden`.
        need_weight: Compute the gradient of `weight`.
        need_bias: Compute the gradient of the bias.
        tiles: Run with these tiles instead of the table's.

    Returns:
        Gradients of hidden `[T, H]`, weight `[V, H]` and bias `[V]` float32; None where not needed.

    Raises:
        ShapeError: Sizes disagree.
    """
    T, V, B = hidden.shape[0], weight.shape[0], cu_seqlens.shape[0] - 1
    nnz = columns.shape[0]
    if grad_values.shape != (nnz,) or argmax_at_kept.shape != (nnz,) or indptr.shape != (B + 1,):
        raise ShapeError(
            f"`grad_values` and `argmax_at_kept` must be [nnz] = ({nnz},) like `columns`, `indptr` "
            f"[B + 1] = ({B + 1},), got {tuple(grad_values.shape)}, {tuple(argmax_at_kept.shape)} "
            f"and {tuple(indptr.shape)}; take them at one selection."
        )
    tiles = tiles or _tiles(hidden)
    outputs = _outputs(hidden, weight, need_hidden, need_weight, need_bias)
    grad_hidden, grad_weight, grad_bias = outputs
    if T == 0 or nnz == 0:
        return _zeroed(outputs)
    grad, argmax = grad_values.to(torch.float32).contiguous(), argmax_at_kept.contiguous()
    columns = columns.to(torch.int32).contiguous()
    cu_seqlens, indptr = cu_seqlens.contiguous(), indptr.contiguous()
    hidden, weight = short_rows(hidden), short_rows(weight)
    with on_device(hidden):
        texts = text_of_each(indptr, nnz)
        if grad_weight is not None or grad_bias is not None:
            order, ends, totals = entries_by_column(columns, texts, B, V)
            launch_weight_kept(
                *(grad, argmax, hidden, cu_seqlens, texts, order, ends, totals),
                *(grad_weight, grad_bias, tiles),
            )
        if grad_hidden is not None:
            launch_hidden_gather(
                grad, indptr, columns, texts, argmax, cu_seqlens, weight, grad_hidden, tiles
            )
    return outputs


def _tiles(hidden: Tensor) -> BackwardTiles:
    """The table's tiles for a device and dtype."""
    return backward_tiles(compute_capability(hidden), hidden.element_size() * 8)


def _outputs(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool
) -> Gradients:
    """Unwritten outputs; every kernel path writes every element."""
    device = hidden.device
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=device) if need_hidden else None,
        torch.empty(weight.shape, dtype=weight.dtype, device=device) if need_weight else None,
        torch.empty(weight.shape[0], dtype=torch.float32, device=device) if need_bias else None,
    )


def _zeroed(outputs: Gradients) -> Gradients:
    """Zero gradients, for batches without entries."""
    for output in outputs:
        if output is not None:
            output.zero_()
    return outputs
