"""Operators of torch with autograd, the same for all devices: `torch.ops.vdr_db.*`.

`project_pool` saves for its gradient the inputs and the argmax `[B, V]` (int16 where the caller
bounds the length), not the logits, let alone `[T, V]`. `gather_kept` saves the selection and nnz
positions; its gradient knows of nnz entries only, 4 H nnz operations instead of 4 H B V. The
operators are opaque to `torch.compile`, which traces through their fake kernels.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vdr_db.kernels.arguments import argmax_dtype
from vdr_db.kernels.reference import text_of

__all__ = [
    "backward_sparse",
    "gather_kept",
    "project_pool",
    "project_pool_backward",
    "select_topk",
]


def launchers(backend: str) -> ModuleType:
    """Module with what a backend has of both operations, imported when first needed."""
    return import_module(f"vdr_db.kernels.{'cpu' if backend == 'cpu' else 'cuda'}.pooling")


@torch.library.custom_op("vdr_db::project_pool", mutates_args=())
def project_pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need_argmax: bool,
    backend: str,
    max_length: int | None,
) -> tuple[Tensor, Tensor]:
    """Logits `[B, V]` and argmax `[B, V]` int16 or int32 (`[0, V]` if not needed).

    A gradient can only be taken if the argmax was needed.
    """
    logits, argmax = launchers(backend).forward(
        hidden, cu_seqlens, weight, bias, need_argmax, max_length=max_length
    )
    if argmax is None:
        argmax = logits.new_empty((0, weight.shape[0]), dtype=argmax_dtype(max_length))
    return logits, argmax


@project_pool.register_fake
def _(hidden: Tensor, cu_seqlens: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, need_argmax, _, max_length = rest
    B, V = cu_seqlens.shape[0] - 1, weight.shape[0]
    is_double = torch.float64 in (hidden.dtype, weight.dtype)
    logits = hidden.new_empty((B, V), dtype=torch.float64 if is_double else torch.float32)
    rows = B if need_argmax else 0
    return logits, hidden.new_empty((rows, V), dtype=argmax_dtype(max_length))


@torch.library.custom_op("vdr_db::project_pool_backward", mutates_args=())
def project_pool_backward(
    grad_logits: Tensor,
    argmax: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden `[T, H]`, weight `[V, H]` and bias `[V]`; `[0]` where not needed."""
    gradients = launchers(backend).backward(
        grad_logits, argmax, hidden, cu_seqlens, weight, need_hidden, need_weight, need_bias
    )
    return present(gradients, hidden, weight, grad_logits)


@project_pool_backward.register_fake
def _(grad_logits: Tensor, *rest: Tensor | bool | str) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(grad_logits, *rest)


def present(
    gradients: tuple[Tensor | None, ...], hidden: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in their dtypes, `[0]` for those not needed: operators return no None."""
    dtypes = hidden.dtype, weight.dtype, grad.dtype
    grad_hidden, grad_weight, grad_bias = (
        grad.new_empty(0) if gradient is None else gradient.to(dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    )
    return grad_hidden, grad_weight, grad_bias


def fake_gradients(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the gradients of hidden, weight and bias.

    Args:
        grad: First argument of a backward operator.
        *rest: Its other arguments, which end in hidden, cu_seqlens, weight, need_hidden,
            need_weight, need_bias and the backend.
    """
    hidden, _, weight, need_hidden, need_weight, need_bias, _ = rest[-7:]
    return (
        hidden.new_empty(hidden.shape) if need_hidden else grad.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else grad.new_empty(0),
        grad.new_empty(weight.shape[0] if need_bias else 0),
    )


def _for_inputs(
    ctx: Any, gradients: tuple[Tensor, Tensor, Tensor], *needed: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs hidden, cu_seqlens, weight and bias."""
    grad_hidden, grad_weight, grad_bias = gradients
    need_hidden, need_weight, need_bias = needed
    return (
        grad_hidden if need_hidden else None,
        None,
        grad_weight if need_weight else None,
        grad_bias.to(ctx.bias_dtype) if need_bias else None,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, cu_seqlens, weight, bias, need_argmax, backend, _ = inputs
    ctx.save_for_backward(output[1], hidden, cu_seqlens, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.need_argmax, ctx.backend = need_argmax, backend


def _differentiate(ctx: Any, grad_logits: Tensor, grad_argmax: None) -> tuple[Tensor | None, ...]:
    if not ctx.need_argmax:
        raise RuntimeError(
            "`vdr_db::project_pool` was called with need_argmax=False and has no gradient; "
            "call `vdr_db.kernels.project_pool`, which asks for the argmax when it is needed."
        )
    need_hidden, _, need_weight, need_bias, *_ = ctx.needs_input_grad
    gradients = project_pool_backward(
        grad_logits, *ctx.saved_tensors, need_hidden, need_weight, need_bias, ctx.backend
    )
    return (*_for_inputs(ctx, gradients, need_hidden, need_weight, need_bias), *(None,) * 3)


project_pool.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("vdr_db::gather_kept", mutates_args=())
def gather_kept(
    logits: Tensor,
    argmax: Tensor,
    indptr: Tensor,
    columns: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Logits `[nnz]` and positions `[nnz]` of kept entries.

    Differentiable in hidden, weight and bias; `logits` and `argmax` count as known.
    """
    return take(logits, argmax, indptr, columns)


def take(logits: Tensor, argmax: Tensor, indptr: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and positions `[nnz]` of kept entries."""
    texts, columns = text_of(indptr, columns.shape[0]), columns.long()
    return logits[texts, columns], argmax[texts, columns]


@gather_kept.register_fake
def _(
    logits: Tensor, argmax: Tensor, indptr: Tensor, columns: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(columns.shape), argmax.new_empty(columns.shape)


@torch.library.custom_op("vdr_db::backward_sparse", mutates_args=())
def backward_sparse(
    grad_values: Tensor,
    indptr: Tensor,
    columns: Tensor,
    argmax_at_kept: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden `[T, H]`, weight `[V, H]` and bias `[V]`; `[0]` where not needed."""
    gradients = launchers(backend).backward_sparse(
        *(grad_values, indptr, columns, argmax_at_kept, hidden, cu_seqlens, weight),
        *(need_hidden, need_weight, need_bias),
    )
    return present(gradients, hidden, weight, grad_values)


@backward_sparse.register_fake
def _(grad_values: Tensor, *rest: Tensor | bool | str) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(grad_values, *rest)


def _save_kept(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, indptr, columns, hidden, cu_seqlens, weight, bias, backend = inputs
    ctx.save_for_backward(indptr, columns, output[1], hidden, cu_seqlens, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.backend = backend


def _differentiate_kept(
    ctx: Any, grad_values: Tensor, grad_positions: None
) -> tuple[Tensor | None, ...]:
    need_hidden, _, need_weight, need_bias = ctx.needs_input_grad[4:8]
    gradients = backward_sparse(
        grad_values, *ctx.saved_tensors, need_hidden, need_weight, need_bias, ctx.backend
    )
    return (*(None,) * 4, *_for_inputs(ctx, gradients, need_hidden, need_weight, need_bias), None)


gather_kept.register_autograd(_differentiate_kept, setup_context=_save_kept)


@torch.library.custom_op("vdr_db::select_topk", mutates_args=())
def select_topk(
    logits: Tensor,
    k: int | None,
    activation: str,
    lexical_indptr: Tensor | None,
    lexical_columns: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """A selection: indptr `[B + 1]`, columns `[nnz]` and weights `[nnz]`; no gradient."""
    lexical = None if lexical_indptr is None else (lexical_indptr, lexical_columns)
    select = launchers(backend).select_topk
    indptr, columns, weights = select(logits, k, activation=activation, lexical=lexical)
    return indptr, columns, weights


@select_topk.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        logits.new_empty(logits.shape[0] + 1, dtype=torch.int64),
        logits.new_empty(nnz, dtype=torch.int32),
        logits.new_empty(nnz, dtype=torch.float32),
    )
