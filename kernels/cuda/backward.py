"""Gradients of the projection and max pooling, deterministic, for all entries and for kept ones.

With a[b, v] the packed token that reached the maximum and g the gradient of the logits:

```
grad_weight[v] = sum over b of g[b, v] * hidden[a[b, v]]
grad_hidden[t] = sum over (b, v) with a[b, v] = t of g[b, v] * weight[v]
grad_bias[v]   = sum over b of g[b, v]
```

`backward` takes g for all entries [B, V]. Long texts gather rows: 2·B·V·H FLOP, about B·V·H
elements read per gradient, two lists of B·V int32 and (V / chunk)·T int32 besides. Short texts
multiply one-hot tiles on the matrix unit: 2·T·V·H FLOP, with each text's tokens filled up to whole
blocks; g is rounded to the input dtype there, as eager autograd does. `backward_sparse` takes g for
nnz kept entries only: B·k instead of B·V rows.

Each row of an output has one owner and one order of addition: results repeat bit for bit. Texts
without tokens get and give nothing. Outputs have the dtype of what they are gradients of (bias:
float32).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vdr_db.errors import ConfigError, ShapeError
from vdr_db.kernels.cuda.backward_kernels import (
    bias_kernel,
    merge_splits_kernel,
    onehot_kernel,
    sum_lists_kernel,
    weight_gather_kernel,
)
from vdr_db.kernels.cuda.configs import BackwardTiles, backward_tiles
from vdr_db.kernels.cuda.entry_lists import Lists, lists_of
from vdr_db.kernels.cuda.primitives import (
    compute_capability,
    is_interpreted,
    on_device,
    short_rows,
)
from vdr_db.kernels.reference import text_of

__all__ = ["backward", "backward_sparse"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

BIAS_BLOCK = 256
"""Columns per program of the bias gradient."""
FILL_PROGRAMS = 256
"""Programs that keep a large device busy; the one-hot hidden gradient splits V to reach them."""


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
        hidden: `[T, H]`, as given to `forward`, like the two that follow.
        cu_seqlens: `[B + 1]`.
        weight: `[V, H]`.
        need_hidden: Compute the first gradient; `need_weight` and `need_bias` the others.
        need_weight: See above.
        need_bias: See above.
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
    grad, cu_seqlens = grad_logits.to(torch.float32).contiguous(), cu_seqlens.contiguous()
    hidden, weight = short_rows(hidden), short_rows(weight)
    use_onehot = method == "onehot" or (method is None and tiles.onehot_length >= T / B)
    with on_device(hidden):
        tokens = _tokens(cu_seqlens[:-1, None], argmax)
        if use_onehot:
            blocks = token_blocks(cu_seqlens, T, tiles.onehot_k)
        if grad_weight is not None and use_onehot:
            multiply_onehot(grad, tokens, blocks, hidden, grad_weight, tiles, False)
        elif grad_weight is not None:
            gather_weight(grad, tokens, hidden, grad_weight, tiles)
        if grad_hidden is not None and use_onehot:
            multiply_onehot(grad, tokens, blocks, weight, grad_hidden, tiles, True)
        elif grad_hidden is not None:
            texts = text_of(cu_seqlens, T, out_int32=True)
            bounds = torch.arange(0, B * V + 1, V, device=tokens.device)
            lists = lists_of(tokens, T, bounds, texts, V, tiles, within_text=True)
            sum_split_lists(grad, None, weight, texts, lists, grad_hidden, tiles)
        if grad_bias is not None:
            grid = (triton.cdiv(V, BIAS_BLOCK),)
            bias_kernel[grid](
                grad, tokens, grad_bias, B, V, BLOCK_V=BIAS_BLOCK, enable_fp_fusion=True
            )
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
        hidden: As for `backward`, like all that follow.
        cu_seqlens: See above.
        weight: See above.
        need_hidden: See above.
        need_weight: See above.
        need_bias: See above.
        tiles: See above.

    Returns:
        As `backward`.

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
    grad, columns = grad_values.to(torch.float32).contiguous(), columns.int().contiguous()
    hidden, weight, indptr = short_rows(hidden), short_rows(weight), indptr.contiguous()
    with on_device(hidden):
        tokens = _tokens(cu_seqlens[text_of(indptr, nnz)], argmax_at_kept)
        if grad_weight is not None or grad_bias is not None:
            bounds = torch.arange(0, nnz + 1, nnz, device=columns.device)
            lists = lists_of(columns, V, bounds, None, nnz, tiles)
            sum_lists(grad, tokens, hidden, lists, grad_weight, grad_bias, tiles)
        if grad_hidden is not None:
            texts = text_of(cu_seqlens, T, out_int32=True)
            lists = lists_of(tokens, T, indptr, texts, min(V, nnz), tiles)
            sum_split_lists(grad, columns, weight, None, lists, grad_hidden, tiles)
    return outputs


def gather_weight(
    grad: Tensor, tokens: Tensor, hidden: Tensor, output: Tensor, tiles: BackwardTiles
) -> None:
    """Weight gradient of all entries by gathering tokens."""
    (B, V), H = grad.shape, hidden.shape[1]
    block_h = _block_h(H, tiles.gather_h)
    weight_gather_kernel[(triton.cdiv(V, tiles.weight_v), triton.cdiv(H, block_h))](
        *(grad, tokens, hidden, output, B, V, *hidden.stride(), *output.stride()),
        H=H,
        BLOCK_V=tiles.weight_v,
        BLOCK_H=block_h,
        num_warps=tiles.gather_warps,
        enable_fp_fusion=True,
    )


def token_blocks(cu_seqlens: Tensor, T: int, size: int) -> Tensor:
    """Blocks of up to `size` tokens of one text: `[n, 3]` int32 of text, first token, and stop.

    Tokens behind the last text B are blocks of text B. How many blocks there are is not looked up
    on the device: those that are too many are empty.
    """
    B = cu_seqlens.shape[0] - 1
    bounds = torch.cat([cu_seqlens, cu_seqlens.new_full((1,), T)])
    ends = ((bounds.diff() + (size - 1)) // size).cumsum(0)
    begins = torch.nn.functional.pad(ends, (1, 0))
    n = B + 1 + T // size
    texts = text_of(begins, n)
    numbers = torch.arange(n, device=texts.device)
    first = torch.nn.functional.pad(bounds, (0, 1), value=T)[texts]
    first = (first + (numbers - begins[texts]) * size).clamp(max=T)
    stop = torch.minimum(first + size, bounds[(texts + 1).clamp(max=B + 1)])
    return torch.stack([texts, first, stop], 1).int()


def multiply_onehot(
    grad: Tensor,
    tokens: Tensor,
    blocks: Tensor,
    matrix: Tensor,
    output: Tensor,
    tiles: BackwardTiles,
    of_tokens: bool,
) -> None:
    """Gradient of tokens or of weight rows on the matrix unit; few tokens split V."""
    (B, V), (n, H), n_blocks = grad.shape, output.shape, blocks.shape[0]
    n_own = n_blocks * tiles.onehot_k if of_tokens else V
    grid = triton.cdiv(n_own, tiles.onehot_m), triton.cdiv(H, tiles.onehot_h)
    split, parts = n_blocks, output[None]
    if of_tokens:
        steps = triton.cdiv(V, tiles.onehot_k)
        n_splits = min(triton.cdiv(FILL_PROGRAMS, grid[0] * grid[1]), steps, 32)
        split = triton.cdiv(steps, n_splits) * tiles.onehot_k
        n_splits = triton.cdiv(V, split)
        if n_splits > 1:
            parts = torch.empty((n_splits, n, H), dtype=torch.float32, device=output.device)
    onehot_kernel[(grid[0], grid[1], parts.shape[0])](
        *(grad, tokens, blocks, matrix, parts, B, V, n_blocks, split),
        *(*matrix.stride(), *parts.stride()),
        H=H,
        OF_TOKENS=of_tokens,
        BLOCK_M=tiles.onehot_m,
        BLOCK_H=tiles.onehot_h,
        BLOCK_K=tiles.onehot_k,
        UPCAST=matrix.dtype == torch.bfloat16 and is_interpreted(onehot_kernel),
        PRECISION="tf32x3",
        num_warps=tiles.onehot_warps,
        num_stages=tiles.onehot_stages,
        enable_fp_fusion=True,
    )
    if parts.shape[0] > 1:
        output.copy_(parts.sum(0))


def sum_lists(
    grad: Tensor,
    rows: Tensor,
    matrix: Tensor,
    lists: Lists,
    output: Tensor | None,
    bias: Tensor | None,
    tiles: BackwardTiles,
) -> None:
    """Gradient of weight rows and of the bias, whichever is wanted, from lists of kept entries."""
    H, n = matrix.shape[1], lists.totals.shape[0]
    block_h = _block_h(H, 1024)
    sum_lists_kernel[(n, 1 if output is None else triton.cdiv(H, block_h))](
        *(grad, rows, matrix, None, *lists, None, None, None, None, output, bias, n, 0),
        *(*matrix.stride(), *(matrix if output is None else output).stride()),
        H=H,
        BLOCK_H=block_h,
        ROWS=4,
        SPLIT=0,
        num_warps=tiles.gather_warps,
        maxnreg=tiles.list_registers,
        enable_fp_fusion=True,
    )


def sum_split_lists(
    grad: Tensor,
    rows: Tensor | None,
    matrix: Tensor,
    texts: Tensor | None,
    lists: Lists,
    output: Tensor,
    tiles: BackwardTiles,
) -> None:
    """Gradient of tokens from their lists; [CLS] may win thousands of entries."""
    (T, H), totals = output.shape, lists.totals
    n_splits = torch.clamp((totals + (tiles.split - 1)) // tiles.split, min=1)
    slot_ends = n_splits.cumsum(0)
    spill_ends = torch.where(n_splits > 1, n_splits, 0).cumsum(0)
    # Bounds known without a look at device memory: only lists longer than `split` are split.
    n_split = lists.order.shape[0] // tiles.split
    spill = torch.empty((2 * n_split, H), dtype=torch.float32, device=output.device)
    owners = text_of(torch.nn.functional.pad(slot_ends, (1, 0)), T + n_split, out_int32=True)
    slots = (owners, slot_ends, spill_ends, spill)
    block_h = _block_h(H, tiles.gather_h)
    grid = (T + n_split, triton.cdiv(H, block_h))
    shared = {"H": H, "BLOCK_H": block_h, "SPLIT": tiles.split, "num_warps": tiles.gather_warps}
    sum_lists_kernel[grid](
        *(grad, rows, matrix, texts, *lists, *slots, output, None, T, matrix.shape[0]),
        *(*matrix.stride(), *output.stride()),
        ROWS=tiles.rows,
        maxnreg=tiles.list_registers,
        enable_fp_fusion=True,
        **shared,
    )
    if n_split:
        merge_splits_kernel[grid](
            *(totals, *slots, output, T, *output.stride()), enable_fp_fusion=True, **shared
        )


def _tokens(starts: Tensor, argmax: Tensor) -> Tensor:
    """Packed token (int32) at which each entry reached its maximum; -1 in a text without tokens."""
    return torch.where(argmax < 0, -1, starts.int() + argmax)


def _block_h(H: int, most: int) -> int:
    """Hidden dimensions per gathering program: a power of 2 that fits H, at most `most`."""
    return min(most, max(16, int(triton.next_power_of_2(H))))


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
