"""Several processes, one batch: gathering with correct gradients, and averaging them.

Each rank computes the loss of its own queries against the documents of all ranks. With

    gather backward   g_local = (sum over ranks of g)[own rows]
    after backward    parameters' gradients averaged over ranks

the result is the gradient of the mean of all ranks' losses: n ranks with B queries each equal one
rank with n B queries. Works with any `torch.distributed` backend, gloo on the CPU among them, and
without a process group as one rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vdr_db.training.sparse_ops import GatedRows

__all__ = [
    "any_over_ranks",
    "average_gradients",
    "gather_dense",
    "gather_rows",
    "launched_rank",
    "mean_over_ranks",
    "of_first_rank",
    "process_group",
    "rank",
    "world_size",
]


def launched_rank() -> int:
    """Number torchrun has given this process, before a process group exists; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The group `torchrun` has prepared, for as long as the block runs; nothing without torchrun.

    Args:
        device: nccl for CUDA, gloo for all else.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """All ranks' rows, one rank after the other; the gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        longest = max(counts)
        padded = local.new_zeros(longest, *local.shape[1:])
        padded[: local.shape[0]] = local
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        start = sum(ctx.counts[: rank()])
        return total[start : start + ctx.counts[rank()]], None


def gather_dense(local: Tensor) -> Tensor:
    """Rows `[n, ...]` of all ranks in their order, `[sum of n, ...]`, with a gradient for each."""
    if world_size() == 1:
        return local
    own = torch.tensor([local.shape[0]], device=local.device)
    everyone = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(everyone, own)
    gathered: Tensor = _Gather.apply(local, torch.cat(everyone).tolist())
    return gathered


def gather_rows(local: GatedRows) -> GatedRows:
    """Sparse rows of all ranks, each any number of them: entries travel, not `[B, V]`."""
    if world_size() == 1:
        return local
    lengths = gather_dense(local.indptr.diff())
    indptr = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    columns = gather_dense(local.columns)
    return GatedRows(indptr, columns, gather_dense(local.weights), local.width)


def mean_over_ranks(local: Tensor) -> Tensor:
    """Mean over ranks of a tensor of one shape; its gradient keeps `n ranks = one batch` true."""
    if world_size() == 1:
        return local
    return gather_dense(local[None]).mean(dim=0)


def any_over_ranks(local: Tensor) -> Tensor:
    """Where any rank has True in a bool tensor of one shape."""
    if world_size() == 1:
        return local
    found = local.to(torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.bool()


def of_first_rank(local: Tensor) -> Tensor:
    """What rank 0 has, of the same shape, dtype and kind of device as here."""
    if world_size() == 1:
        return local
    found = local.clone()
    dist.broadcast(found, 0)
    return found


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replaces each gradient by its mean over ranks, which have the same parameters in one order.

    A missing one counts as 0.
    """
    if world_size() == 1:
        return
    travelling = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        travelling.append((parameter.grad, dist.all_reduce(parameter.grad, async_op=True)))
    for gradient, work in travelling:
        work.wait()
        gradient /= world_size()
