"""Other ways to compute pooled vocabulary logits, for comparison only.

`eager` is the plain formula on padded batches. `chunked` runs cuBLAS on groups of texts and takes
each text's maximum. `sparton_head` is the published code of Sparton (arXiv 2603.25011), as the
package experimaestro-ir carries it: a compiled product for each tile of the vocabulary, a Triton
maximum over its logits, and a backward that adds with atomics. `tokens_on_rows` is a kernel of our
own in the other orientation, tokens on the M axis of the matrix instruction with an online maximum;
it is nobody's published code.
"""

# ruff: noqa: ANN001, ANN201
# Device functions take what Triton traces; annotations on them would mean constants.

from __future__ import annotations

import functools
import importlib.util
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor


def eager(padded: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Activated maxima `[B, V]` from padded hidden states `[B, L, H]`, all logits in memory."""
    logits = padded @ weight.T
    activated = torch.nn.functional.elu(logits) + 1
    return activated.masked_fill(~mask[:, :, None], 0).amax(1)


def chunked(
    hidden: Tensor, bounds: list[int], weight: Tensor, buffer: Tensor, output: Tensor
) -> Tensor:
    """Maxima `[B, V]` by products of as many texts as the buffer `[tokens, V]` holds."""
    text, n_texts = 0, len(bounds) - 1
    while text < n_texts:
        stop = text + 1
        while stop < n_texts and bounds[stop + 1] - bounds[text] <= buffer.shape[0]:
            stop += 1
        first = bounds[text]
        products = torch.mm(
            hidden[first : bounds[stop]], weight.T, out=buffer[: bounds[stop] - first]
        )
        for row in range(text, stop):
            if bounds[row + 1] > bounds[row]:
                tokens = products[bounds[row] - first : bounds[row + 1] - first]
                output[row] = tokens.amax(0)
        text = stop
    return output


@functools.cache
def sparton() -> ModuleType | None:
    """Sparton's module, by its file: its package imports a whole experiment framework."""
    package = importlib.util.find_spec("xpmir")
    if package is None or not package.submodule_search_locations:
        return None
    file = Path(package.submodule_search_locations[0], "neural", "_sparton", "_kernel.py")
    found = importlib.util.spec_from_file_location("sparton_kernel", file)
    if found is None or found.loader is None or not file.exists():
        return None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def sparton_name() -> str:
    """Sparton and the version of the package that carries it."""
    return f"Sparton (experimaestro-ir {version('experimaestro-ir')})"


def sparton_head(weight: Tensor) -> torch.nn.Module | None:
    """Sparton's head with a matrix `[V, H]` and zeros as bias; None where it is not installed.

    It maps hidden states `[B, L, H]` and a mask `[B, L]` of their dtype to log1p(relu(maxima))
    `[B, V]`, on CUDA only.
    """
    module = sparton()
    if module is None:
        return None
    with torch.device("meta"):
        head: torch.nn.Module = module.SpartonHead(*weight.shape, use_bias=True)
    head.weight = torch.nn.Parameter(weight)
    head.bias = torch.nn.Parameter(weight.new_zeros(weight.shape[0]))
    return head


@triton.jit(do_not_specialize=["T", "V"])
def tokens_on_rows_kernel(
    hidden_ptr,
    weight_ptr,
    cu_seqlens_ptr,
    logits_ptr,
    argmax_ptr,
    T,
    V,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (vocabulary tile, text), tokens on the M axis."""
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    text = tl.program_id(1)
    start = tl.load(cu_seqlens_ptr + text).to(tl.int32)
    end = tl.load(cu_seqlens_ptr + text + 1).to(tl.int32)
    rows_v = tl.minimum(offs_v, V - 1).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    best = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    where = tl.full((BLOCK_V,), -1, tl.int32)
    for token in tl.range(start, end, BLOCK_T):
        offs_t = token + tl.arange(0, BLOCK_T)
        rows_t = tl.minimum(offs_t, T - 1).to(tl.int64)
        products = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for k in range(0, H, BLOCK_K):
            inside = offs_k < H - k
            h = tl.load(
                hidden_ptr + rows_t[:, None] * H + (k + offs_k)[None, :],
                mask=inside[None, :],
                other=0.0,
            )
            w = tl.load(
                weight_ptr + rows_v[None, :] * H + (k + offs_k)[:, None],
                mask=inside[:, None],
                other=0.0,
            )
            products = tl.dot(h, w, products)
        products = tl.where((offs_t < end)[:, None], products, float("-inf"))
        tile_best, tile_where = tl.max(products, 0, return_indices=True)
        better = (tile_best > best) | (where < 0)
        where = tl.where(better, tile_where + token - start, where)
        best = tl.maximum(best, tile_best)
    offset = text.to(tl.int64) * V + offs_v
    tl.store(logits_ptr + offset, best, mask=offs_v < V)
    tl.store(argmax_ptr + offset, where, mask=offs_v < V)


@triton.jit(do_not_specialize=["T", "V"])
def atomics_backward_kernel(
    grad_ptr,
    argmax_ptr,
    hidden_ptr,
    weight_ptr,
    cu_seqlens_ptr,
    grad_hidden_ptr,
    grad_weight_ptr,
    V,
    H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Adds each entry's row to both gradients with atomics: the order changes from run to run."""
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    text = tl.program_id(1)
    offs_h = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    offset = text.to(tl.int64) * V + offs_v
    position = tl.load(argmax_ptr + offset, mask=offs_v < V, other=-1)
    grad = tl.load(grad_ptr + offset, mask=offs_v < V, other=0.0)
    token = tl.load(cu_seqlens_ptr + text).to(tl.int64) + position
    mask = (position >= 0)[:, None] & (offs_h < H)[None, :]
    at_token = token[:, None] * H + offs_h[None, :]
    at_column = offs_v.to(tl.int64)[:, None] * H + offs_h[None, :]
    h = tl.load(hidden_ptr + at_token, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + at_column, mask=mask, other=0.0).to(tl.float32)
    tl.atomic_add(grad_weight_ptr + at_column, grad[:, None] * h, mask=mask, sem="relaxed")
    tl.atomic_add(grad_hidden_ptr + at_token, grad[:, None] * w, mask=mask, sem="relaxed")


def tokens_on_rows(
    hidden: Tensor, cu_seqlens: Tensor, weight: Tensor, block: int = 128
) -> tuple[Tensor, Tensor]:
    """Logits `[B, V]` float32 and argmax `[B, V]` int32; contiguous inputs."""
    B, V = cu_seqlens.shape[0] - 1, weight.shape[0]
    logits = torch.empty((B, V), dtype=torch.float32, device=hidden.device)
    argmax = torch.empty((B, V), dtype=torch.int32, device=hidden.device)
    tokens_on_rows_kernel[(triton.cdiv(V, block), B)](
        hidden,
        weight,
        cu_seqlens,
        logits,
        argmax,
        hidden.shape[0],
        V,
        H=hidden.shape[1],
        BLOCK_T=block,
        BLOCK_V=block,
        BLOCK_K=min(block, 64),
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,
    )
    return logits, argmax


def atomics_backward(
    grad: Tensor, argmax: Tensor, hidden: Tensor, cu_seqlens: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight in float32, added by atomics."""
    B, V = grad.shape
    H = hidden.shape[1]
    grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=hidden.device)
    block_h = min(256, triton.next_power_of_2(H))
    atomics_backward_kernel[(triton.cdiv(V, 16), B, triton.cdiv(H, block_h))](
        grad,
        argmax,
        hidden,
        weight,
        cu_seqlens,
        grad_hidden,
        grad_weight,
        V,
        H=H,
        BLOCK_V=16,
        BLOCK_H=block_h,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return grad_hidden, grad_weight
