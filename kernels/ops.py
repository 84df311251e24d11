"""`torch.ops.vdr_db.project_pool` and its backward: one operator for all devices, with autograd.

Saved for the gradient: inputs and the argmax `[B, V]`, not the logits, let alone `[T, V]`. The
operators are opaque to `torch.compile`, which traces through their fake kernels.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["project_pool", "project_pool_backward"]


def launchers(backend: str) -> ModuleType:
    """Module with `forward` and `backward` for a backend, imported when first needed."""
    if backend == "cpu":
        from vdr_db.kernels import cpu

        return cpu
    from vdr_db.kernels import pooling

    return pooling


@torch.library.custom_op(
    "vdr_db::project_pool",
    mutates_args=(),
    schema="(Tensor hidden, Tensor cu_seqlens, Tensor weight, Tensor? bias, bool need_argmax, "
    "str backend) -> (Tensor, Tensor)",
)
def project_pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need_argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Logits `[B, V]` and argmax `[B, V]` int32 (`[0, V]` if not needed).

    A gradient can only be taken if the argmax was needed.
    """
    logits, argmax = launchers(backend).forward(hidden, cu_seqlens, weight, bias, need_argmax)
    if argmax is None:
        argmax = logits.new_empty((0, weight.shape[0]), dtype=torch.int32)
    return logits, argmax


@project_pool.register_fake
def _(
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need_argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    B, V = cu_seqlens.shape[0] - 1, weight.shape[0]
    is_double = torch.float64 in (hidden.dtype, weight.dtype)
    logits = hidden.new_empty((B, V), dtype=torch.float64 if is_double else torch.float32)
    return logits, hidden.new_empty((B if need_argmax else 0, V), dtype=torch.int32)


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
        grad_logits.new_empty(0) if grad is None else grad.to(dtype)
        for grad, dtype in zip(gradients, dtypes, strict=True)
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
    return (
        hidden.new_empty(hidden.shape) if need_hidden else grad_logits.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else grad_logits.new_empty(0),
        grad_logits.new_empty(weight.shape[0] if need_bias else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, cu_seqlens, weight, bias, need_argmax, backend = inputs
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
    grad_hidden, grad_weight, grad_bias = project_pool_backward(
        grad_logits, *ctx.saved_tensors, need_hidden, need_weight, need_bias, ctx.backend
    )
    return (
        grad_hidden if need_hidden else None,
        None,
        grad_weight if need_weight else None,
        grad_bias.to(ctx.bias_dtype) if need_bias else None,
        None,
        None,
    )


project_pool.register_autograd(_differentiate, setup_context=_save)
