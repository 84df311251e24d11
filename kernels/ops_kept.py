"""Operators of kept entries: `gather_kept` with its k-sparse gradient, and `select_topk`.

    kept[n] = logits[text of entry n, columns[n]]

The gradient of `gather_kept` knows of nnz entries only: 4 H nnz operations instead of 4 H B V.
Saved for it: inputs, the selection, and nnz positions; not the `[B, V]` argmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdr_db.kernels.activation import Activation
from vdr_db.kernels.ops import fake_gradients, launchers, present
from vdr_db.kernels.reference import text_of

__all__ = [
    "backward_sparse",
    "backward_sparse_into",
    "gather_kept",
    "select_topk",
]


@torch.library.custom_op(
    "vdr_db::gather_kept",
    mutates_args=(),
    schema="(Tensor logits, Tensor argmax, Tensor indptr, Tensor columns, Tensor hidden, "
    "Tensor cu_seqlens, Tensor weight, Tensor? bias, str backend, Tensor? accumulate_into=None) "
    "-> (Tensor, Tensor)",
)
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
    accumulate_into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits `[nnz]` and positions `[nnz]` of kept entries.

    Differentiable in hidden, weight and bias; `logits` and `argmax` count as known. With
    `accumulate_into` `[V, H]` the backward pass adds the gradient of weight to that tensor.
    """
    return take(logits, argmax, indptr, columns)


def take(logits: Tensor, argmax: Tensor, indptr: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and positions `[nnz]` of kept entries."""
    texts, columns = text_of(indptr, columns.shape[0]), columns.long()
    return logits[texts, columns], argmax[texts, columns]


@gather_kept.register_fake
def _(
    logits: Tensor,
    argmax: Tensor,
    indptr: Tensor,
    columns: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    backend: str,
    accumulate_into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(columns.shape), argmax.new_empty(columns.shape)


@torch.library.custom_op(
    "vdr_db::backward_sparse",
    mutates_args=(),
    schema="(Tensor grad_values, Tensor indptr, Tensor columns, Tensor argmax_at_kept, "
    "Tensor hidden, Tensor cu_seqlens, Tensor weight, bool need_hidden, bool need_weight, "
    "bool need_bias, str backend) -> (Tensor, Tensor, Tensor)",
)
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
    dtypes = hidden.dtype, weight.dtype, grad_values.dtype
    grad_hidden, grad_weight, grad_bias = (
        present(grad, dtype, grad_values) for grad, dtype in zip(gradients, dtypes, strict=True)
    )
    return grad_hidden, grad_weight, grad_bias


@backward_sparse.register_fake
def _(
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
    return fake_gradients(grad_values, hidden, weight, need_hidden, need_weight, need_bias)


@torch.library.custom_op(
    "vdr_db::backward_sparse_into",
    mutates_args=("accumulate_into",),
    schema="(Tensor(a!) accumulate_into, Tensor grad_values, Tensor indptr, Tensor columns, "
    "Tensor argmax_at_kept, Tensor hidden, Tensor cu_seqlens, Tensor weight, bool need_hidden, "
    "bool need_bias, str backend) -> (Tensor, Tensor)",
)
def backward_sparse_into(
    accumulate_into: Tensor,
    grad_values: Tensor,
    indptr: Tensor,
    columns: Tensor,
    argmax_at_kept: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    need_hidden: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Adds the gradient of weight to kept rows of a tensor; returns those of hidden and bias."""
    grad_hidden, _, grad_bias = launchers(backend).backward_sparse(
        *(grad_values, indptr, columns, argmax_at_kept, hidden, cu_seqlens, weight),
        *(need_hidden, True, need_bias),
        accumulate_into=accumulate_into,
    )
    return (
        present(grad_hidden, hidden.dtype, grad_values),
        present(grad_bias, grad_values.dtype, grad_values),
    )


@backward_sparse_into.register_fake
def _(
    accumulate_into: Tensor,
    grad_values: Tensor,
    indptr: Tensor,
    columns: Tensor,
    argmax_at_kept: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    need_hidden: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grads = fake_gradients(grad_values, hidden, weight, need_hidden, False, need_bias)
    return grads[0], grads[2]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, indptr, columns, hidden, cu_seqlens, weight, bias, backend, accumulate_into = inputs
    ctx.save_for_backward(indptr, columns, output[1], hidden, cu_seqlens, weight)
    # Not among the saved: those must not be written between the passes, and a sum of gradients is.
    ctx.accumulate_into = accumulate_into
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.backend = backend


def _differentiate(
    ctx: Any, grad_values: Tensor, grad_positions: None
) -> tuple[Tensor | None, ...]:
    need_hidden, _, need_weight, need_bias = ctx.needs_input_grad[4:8]
    grad_weight: Tensor | None = None
    if need_weight and ctx.accumulate_into is not None:
        grad_hidden, grad_bias = backward_sparse_into(
            *(ctx.accumulate_into, grad_values, *ctx.saved_tensors),
            *(need_hidden, need_bias, ctx.backend),
        )
    else:
        grad_hidden, grad_weight, grad_bias = backward_sparse(
            grad_values, *ctx.saved_tensors, need_hidden, need_weight, need_bias, ctx.backend
        )
    return (
        *(None,) * 4,
        grad_hidden if need_hidden else None,
        None,
        grad_weight if need_weight else None,
        grad_bias.to(ctx.bias_dtype) if need_bias else None,
        None,
        None,
    )


gather_kept.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op(
    "vdr_db::select_topk",
    mutates_args=(),
    schema="(Tensor logits, SymInt? k, str activation, Tensor? lexical_indptr, "
    "Tensor? lexical_columns, str backend) -> (Tensor, Tensor, Tensor)",
)
def select_topk(
    logits: Tensor,
    k: int | None,
    activation: Activation,
    lexical_indptr: Tensor | None,
    lexical_columns: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """A selection: indptr `[B + 1]`, columns `[nnz]` and weights `[nnz]`; no gradient."""
    lexical = None
    if lexical_indptr is not None and lexical_columns is not None:
        lexical = (lexical_indptr, lexical_columns)
    if backend == "cpu":
        from vdr_db.kernels.cpu import pooling as cpu

        kept = cpu.select_topk(logits, k, activation=activation, lexical=lexical)
        return kept.indptr, kept.columns, kept.weights
    from vdr_db.kernels.cuda import topk

    kept = topk.select_topk(logits, k, activation=activation, lexical=lexical)
    return kept.indptr, kept.columns, kept.weights


@select_topk.register_fake
def _(
    logits: Tensor,
    k: int | None,
    activation: Activation,
    lexical_indptr: Tensor | None,
    lexical_columns: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        logits.new_empty(logits.shape[0] + 1, dtype=torch.int64),
        logits.new_empty(nnz, dtype=torch.int32),
        logits.new_empty(nnz, dtype=torch.float32),
    )
