"""The operations, by device: one decision, one override.

`"auto"` takes Triton for CUDA tensors, the packed CPU path for tensors in main memory, and the
reference for all else. `backend=` forces one; what cannot run is an error, never another path.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from vdr_db.errors import ConfigError
from vdr_db.kernels import reference
from vdr_db.kernels.arguments import Lexical, check_pool
from vdr_db.kernels.names import BACKENDS, Activation, Backend
from vdr_db.kernels.reference import Pooled, Selection

__all__ = ["BACKENDS", "Backend", "choose_backend", "gather_kept", "project_pool", "select_topk"]

OLDEST_TRITON = (3, 4)
"""First version with tensor descriptors made on the host; torch 2.8 comes with it."""

logger = logging.getLogger(__name__)


def project_pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    return_argmax: bool = False,
    max_length: int | None = None,
    backend: Backend = "auto",
) -> Pooled:
    """Max-pooled vocabulary logits of each document of a packed batch, without `[T, V]` in memory.

    logits[b, v] = max over tokens l of document b of hidden[l] . weight[v], + bias[v]. A document's
    row depends on its own tokens alone. Differentiable in `hidden`, `weight` and `bias`; the
    gradient of a maximum goes to the first token that reaches it. NaN counts as largest. Under
    autocast on CUDA, `hidden` and `weight` are cast as for a linear layer; accumulation and result
    are float32 all the same.

    Args:
        hidden: `[T, H]`, float, the tokens of all documents one after the other.
        cu_seqlens: `[B + 1]`, int32 or int64: document b has tokens `cu_seqlens[b]` up to, not
            including, `cu_seqlens[b + 1]`.
        weight: `[V, H]`, float; any strides.
        bias: `[V]`, float, or None.
        return_argmax: Also return which token reached each maximum.
        max_length: Bound on the tokens of a document, where the caller knows one: up to 32,767
            positions take 2 bytes instead of 4, also those kept for the gradient. On a device it is
            taken on trust, because a look at `cu_seqlens` would make the host wait; but where it is
            false and a position does not fit, the logit is NaN and its argmax -1, so that
            selections and losses show it.
        backend: `"auto"`, or the implementation to use.

    Returns:
        `Pooled`: logits `[B, V]`, float32 (float64 for float64 inputs), -inf for a document without
        tokens; argmax `[B, V]`, int32 (int16 under a `max_length` that allows it), position within
        the document, -1 without tokens; or None.

    Raises:
        ShapeError: Sizes, dtypes or devices disagree, or (in main memory) `cu_seqlens` is not a
            running sum up to T or a document is longer than `max_length`.
        ConfigError: The forced backend cannot run here.
    """
    check_pool(hidden, cu_seqlens, weight, bias)
    device = hidden.device.type
    needs_gradient = is_recorded(hidden, weight, bias)
    hidden, weight, chosen = prepared(hidden, weight, backend)
    with torch.autocast(device, enabled=False):
        if chosen == "reference":
            return reference.project_pool(
                hidden, cu_seqlens, weight, bias, return_argmax=return_argmax, max_length=max_length
            )
        from vdr_db.kernels.dispatch import ops

        if not needs_gradient and not torch.compiler.is_compiling():
            # The first call of a torch operator loads the whole compiler: seconds, and 130 MB.
            forward = ops.launchers(chosen).forward
            pooled = forward(hidden, cu_seqlens, weight, bias, return_argmax, max_length=max_length)
            return Pooled(*pooled)
        need_argmax = return_argmax or needs_gradient
        logits, argmax = ops.project_pool(
            hidden, cu_seqlens, weight, bias, need_argmax, chosen, max_length
        )
    return Pooled(logits, argmax if return_argmax else None)


def gather_kept(
    pooled: Pooled,
    indptr: Tensor,
    columns: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Logits of kept entries, with a gradient that touches those entries alone.

    For losses that see a selection only: pool without gradient, select, and gather what was kept.
    The backward pass then gathers nnz rows instead of B V. Differentiable in `hidden`, `weight` and
    `bias`; `pooled` is taken as known, and must have been pooled from the same tensors.

    Args:
        pooled: Of `project_pool`, with argmax.
        indptr: `[B + 1]`, int32 or int64: document b keeps `columns[indptr[b]:indptr[b + 1]]`.
        columns: `[nnz]`, int32 or int64, each once in a document, all of them written.
        hidden: As given to `project_pool`.
        cu_seqlens: As given to `project_pool`.
        weight: As given to `project_pool`.
        bias: As given to `project_pool`.
        backend: `"auto"`, or the implementation to use.

    Returns:
        `[nnz]`, dtype of the logits.

    Raises:
        ShapeError: Sizes, dtypes or devices disagree, or there is no argmax.
        ConfigError: The forced backend cannot run here.
    """
    check_pool(hidden, cu_seqlens, weight, bias)
    device = hidden.device.type
    needs_gradient = is_recorded(hidden, weight, bias)
    hidden, weight, chosen = prepared(hidden, weight, backend)
    with torch.autocast(device, enabled=False):
        if chosen == "reference":
            return reference.gather_kept(pooled, indptr, columns, hidden, cu_seqlens, weight, bias)
        argmax = reference.kept_argmax(pooled, indptr, columns, cu_seqlens, weight)
        from vdr_db.kernels.dispatch import ops

        logits = pooled.logits.detach()
        if not needs_gradient and not torch.compiler.is_compiling():
            return ops.take(logits, argmax, indptr, columns)[0]
        kept: Tensor = ops.gather_kept(
            logits, argmax, indptr, columns, hidden, cu_seqlens, weight, bias, chosen
        )[0]
        return kept


def select_topk(
    logits: Tensor,
    k: int | None,
    *,
    activation: Activation,
    lexical: Lexical | None = None,
    trim: bool = True,
    backend: Backend = "auto",
) -> Selection:
    """The k largest columns of each row, joined with given columns, and their weights, as CSR.

    Of equal logits the smallest columns are taken. NaN counts as largest, so that it surfaces. -inf
    is never kept, nor a column whose weight is not greater than 0. Not differentiable.

    Args:
        logits: `[B, V]`, float32 or float64, as `project_pool` returns them.
        k: How many columns to take from each row, 1 to V; None takes all.
        activation: Turns kept logits into weights.
        lexical: (indptr `[B + 1]`, columns `[n]`), int32 or int64: columns to keep in any case,
            each in [0, V), in any order; repetitions do no harm.
        trim: If False, columns and weights may hold more than nnz entries, of which the first
            `indptr[-1]` count: on a device the host then need not wait to learn nnz.
        backend: `"auto"`, or the implementation to use.

    Returns:
        `Selection`: indptr `[B + 1]` int64, columns `[nnz]` int32 ascending in each row, weights
        `[nnz]` float32.

    Raises:
        ConfigError: `k` is not in [1, V], `activation` is unknown, or the forced backend cannot
            run here.
        ShapeError: Sizes or dtypes disagree, or a lexical column is not in [0, V).
    """
    chosen = choose_backend(backend, logits, logits.dtype)
    if chosen == "reference":
        return reference.select_topk(logits, k, activation=activation, lexical=lexical)
    from vdr_db.kernels.dispatch import ops

    if torch.compiler.is_compiling():
        given = (None, None) if lexical is None else lexical
        return Selection(*ops.select_topk(logits.detach(), k, activation, *given, chosen))
    options = {} if chosen == "cpu" else {"trim": trim}
    select = ops.launchers(chosen).select_topk
    selection: Selection = select(logits, k, activation=activation, lexical=lexical, **options)
    return selection


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of one of them."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def prepared(
    hidden: Tensor, weight: Tensor, backend: Backend
) -> tuple[Tensor, Tensor, Literal["reference", "cpu", "triton"]]:
    """Hidden states and weights in the dtypes that the chosen backend reads, and its name."""
    device = hidden.device.type
    if device == "cuda" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    common = torch.promote_types(hidden.dtype, weight.dtype)
    chosen = choose_backend(backend, hidden, common)
    if chosen == "triton":
        hidden, weight = hidden.to(common), weight.to(common)
    return hidden, weight, chosen


def choose_backend(
    backend: Backend, tensor: Tensor, dtype: torch.dtype
) -> Literal["reference", "cpu", "triton"]:
    """Implementation that will run: the only place where this is decided.

    Args:
        backend: What the caller asked for.
        tensor: One of the tensors; only its device counts.
        dtype: In which the inputs will be read.

    Returns:
        The backend; never `"auto"`.

    Raises:
        ConfigError: It is unknown, or cannot run here.
    """
    device = tensor.device.type
    if backend not in BACKENDS:
        raise ConfigError(f"`backend` must be one of {BACKENDS}, got {backend!r}.")
    if backend == "reference":
        return "reference"
    if backend in ("cpu", "cpu-int8"):  # all scores, or a whole selection: nothing to scan for
        if device != "cpu":
            raise ConfigError(
                f'`backend="{backend}"` needs tensors on the CPU, got {device}; move them, or use '
                '"auto".'
            )
        return "cpu"
    if backend == "auto" and device != "cuda":
        return "cpu" if device == "cpu" else "reference"
    obstacle = triton_obstacle(device, dtype)
    if not obstacle:
        return "triton"
    if backend == "triton":
        raise ConfigError(f'`backend="triton"` cannot run here: {obstacle}; use "auto".')
    warn_slow(obstacle)
    return "reference"


def triton_obstacle(device: str, dtype: torch.dtype) -> str:
    """Why the Triton kernels cannot run; empty if they can."""
    if dtype == torch.float64:
        return "they have no float64"
    version = triton_version()
    if version is None:
        return "the package `triton` is not installed"
    if version < OLDEST_TRITON:
        oldest, found = ".".join(map(str, OLDEST_TRITON)), ".".join(map(str, version))
        return f"they need the package `triton` {oldest} or later, got {found}"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors are on {device}, not on CUDA, and Triton's interpreter is off"
    return ""


@cache
def triton_version() -> tuple[int, ...] | None:
    """Major and minor version of Triton, whatever its package is called; None without it."""
    if find_spec("triton") is None:
        return None
    from triton import __version__

    return tuple(int(part) for part in __version__.split(".")[:2])


@cache
def warn_slow(obstacle: str) -> None:
    """Says once for each cause that CUDA tensors take the slow path."""
    logger.warning("Triton kernels are not used (%s); the slower reference is.", obstacle)
