"""`torch.ops.vdr_db.project_pool` and its backward: one operator for all devices, with autograd.

Saved for the gradient: inputs and the argmax `[B, V]` (int16 where the caller bounds the length),
not the logits, let alone `[T, V]`. The operators are opaque to `torch.compile`, which traces
through their fake kernels. `ops_kept` holds the operators of kept entries.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vdr_db.kernels.arguments import argmax_dtype

__all__ = ["project_pool", "project_pool_backward", "project_pool_backward_into"]


def launchers(backend: str) -> ModuleType:
    """Module with `forward`, `backward` and `backward_sparse`, imported when first needed."""
    if backend == "cpu":
        from vdr_db.kernels.cpu import pooling as cpu

        return cpu
    from vdr_db.kernels.cuda import pooling

    return pooling


@torch.library.custom_op(
    "vdr_db::project_pool",
    mutates_args=(),
    schema="(Tensor hidden, Tensor cu_seqlens, Tensor weight, Tensor? bias, bool need_argmax, "
    "str backend, SymInt? max_length=None, Tensor? accumulate_into=None) -> (Tensor, Tensor)",
)
def project_pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need_argmax: bool,
    backend: str,
    max_length: int | None = None,
    accumulate_into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits `[B, V]` and argmax `[B, V]` int16 or int32 (`[0, V]` if not needed).

    A gradient can only be taken if the argmax was needed. With `accumulate_into` `[V, H]` the
    backward pass adds the gradient of weight to that tensor, and weight itself gets none.
    """
    logits, argmax = launchers(backend).forward(
        hidden, cu_seqlens, weight, bias, need_argmax, max_length=max_length
    )
    if argmax is None:
        argmax = logits.new_empty((0, weight.shape[0]), dtype=argmax_dtype(max_length))
    return logits, argmax


@project_pool.register_fake
def _(
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need_argmax: bool,
    backend: str,
    max_length: int | None = None,
    accumulate_into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    B, V = cu_seqlens.shape[0] - 1, weight.shape[0]
    is_double = torch.float64 in (hidden.dtype, weight.dtype)
    logits = hidden.new_empty((B, V), dtype=torch.float64 if is_double else torch.float32)
    rows = B if need_argmax else 0
    return logits, hidden.new_empty((rows, V), dtype=argmax_dtype(max_length))


@torch.library.custom_op(
    "vdr_db::project_pool_backward",
    mutates_args=(),
    schema="(Tensor grad_logits, Tensor argmax, Tensor hidden, Tensor cu_seqlens, Tensor weight, "
    "bool need_hidden, bool need_weight, bool need_bias, str backend) -> (Tensor, Tensor, Tensor)",
)
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
    dtypes = hidden.dtype, weight.dtype, grad_logits.dtype
    grad_hidden, grad_weight, grad_bias = (
        present(grad, dtype, grad_logits) for grad, dtype in zip(gradients, dtypes, strict=True)
    )
    return grad_hidden, grad_weight, grad_bias


@project_pool_backward.register_fake
def _(
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
    return fake_gradients(grad_logits, hidden, weight, need_hidden, need_weight, need_bias)


@torch.library.custom_op(
    "vdr_db::project_pool_backward_into",
    mutates_args=("accumulate_into",),
    schema="(Tensor(a!) accumulate_into, Tensor grad_logits, Tensor argmax, Tensor hidden, "
    "Tensor cu_seqlens, Tensor weight, bool need_hidden, bool need_bias, str backend) "
    "-> (Tensor, Tensor)",
)
def project_pool_backward_into(
    accumulate_into: Tensor,
    grad_logits: Tensor,
    argmax: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    need_hidden: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Adds the gradient of weight to `accumulate_into`; returns those of hidden and bias."""
    grad_hidden, _, grad_bias = launchers(backend).backward(
        *(grad_logits, argmax, hidden, cu_seqlens, weight, need_hidden, True, need_bias),
        accumulate_into=accumulate_into,
    )
    return (
        present(grad_hidden, hidden.dtype, grad_logits),
        present(grad_bias, grad_logits.dtype, grad_logits),
    )


@project_pool_backward_into.register_fake
def _(
    accumulate_into: Tensor,
    grad_logits: Tensor,
    argmax: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    need_hidden: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grads = fake_gradients(grad_logits, hidden, weight, need_hidden, False, need_bias)
    return grads[0], grads[2]


def present(gradient: Tensor | None, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A gradient in its dtype, or `[0]` for one that is not needed: operators return no None."""
    return like.new_empty(0) if gradient is None else gradient.to(dtype)


def fake_gradients(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the gradients of hidden, weight and bias."""
    return (
        hidden.new_empty(hidden.shape) if need_hidden else grad.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else grad.new_empty(0),
        grad.new_empty(weight.shape[0] if need_bias else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, cu_seqlens, weight, bias, need_argmax, backend, _, accumulate_into = inputs
    ctx.save_for_backward(output[1], hidden, cu_seqlens, weight)
    # Not among the saved: those must not be written between the passes, and a sum of gradients is.
    ctx.accumulate_into = accumulate_into
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.need_argmax, ctx.backend = need_argmax, backend


def _differentiate(ctx: Any, grad_logits: Tensor, grad_argmax: None) -> tuple[Tensor | None, ...]:
    if not ctx.need_argmax:
        raise RuntimeError(
            "`vdr_db::project_pool` was called with need_argmax=False and has no gradient; "
            "call `vdr_db.kernels.project_pool`, which asks for the argmax when it is needed."
        )
    need_hidden, _, need_weight, need_bias, *_ = ctx.needs_input_grad
    grad_weight: Tensor | None = None
    if need_weight and ctx.accumulate_into is not None:
        grad_hidden, grad_bias = project_pool_backward_into(
            *(ctx.accumulate_into, grad_logits, *ctx.saved_tensors),
            *(need_hidden, need_bias, ctx.backend),
        )
    else:
        grad_hidden, grad_weight, grad_bias = project_pool_backward(
            grad_logits, *ctx.saved_tensors, need_hidden, need_weight, need_bias, ctx.backend
        )
    return (
        grad_hidden if need_hidden else None,
        None,
        grad_weight if need_weight else None,
        grad_bias.to(ctx.bias_dtype) if need_bias else None,
        *(None,) * 4,
    )


project_pool.register_autograd(_differentiate, setup_context=_save)
