"""Inputs and losses that the tests of the operators share, also between processes."""

from __future__ import annotations

import datetime
import os

import torch
from strategies import bounds_of

from vdr_db.kernels import activate, gather_kept, project_pool, select_topk

SIZES = [4, 0, 7, 1, 0]
H, V = 16, 23


def inputs(dtype=torch.float32, requires_grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (sum(SIZES), H), (V, H), (V,)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad)
        for shape in shapes
    )
    return hidden, bounds_of(SIZES), weight, bias


def kept_of(tensors, k=5, **options):
    """Pooled logits without gradient, and the k kept columns of each text."""
    with torch.no_grad():
        pooled = project_pool(*tensors, return_argmax=True, **options)
        selection = select_topk(pooled.logits, k, activation="none")
    return pooled, selection.indptr, selection.columns


def kept_loss(hidden, bounds, weight, bias, **options):
    """Loss of a gated side, from pooling to the sum."""
    pooled, indptr, columns = kept_of((hidden.detach(), bounds, weight.detach(), bias.detach()))
    kept = gather_kept(pooled, indptr, columns, hidden, bounds, weight, bias, **options)
    return activate(kept, "elu1p").square().sum()


def dense_loss(hidden, bounds, weight, bias, **options):
    """Loss of a dense side; texts without tokens have nothing to give."""
    logits = project_pool(hidden, bounds, weight, bias, **options).logits
    return activate(logits[bounds.diff() > 0], "elu1p").square().sum()


class TiedModel(torch.nn.Module):
    """Embeds token ids, and scores them with the rows of the same table from `first` on."""

    def __init__(self, first=3):
        super().__init__()
        torch.manual_seed(0)
        self.first = first
        self.table = torch.nn.Embedding(first + V, H)
        self.layer = torch.nn.Linear(H, H)
        self.bias = torch.nn.Parameter(torch.zeros(V))

    def forward(self, ids, lengths, loss):
        rows = self.layer(self.table(ids)).tanh()
        return loss(rows, bounds_of(lengths), self.table.weight[self.first :], self.bias)


def share(rank):
    """Token ids and lengths of one process; lengths differ between processes."""
    lengths = [3, 5] if rank == 0 else [4, 1, 6]
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(3 + V, (sum(lengths),), generator=generator), lengths


def train_one_rank(rank, folder, losses):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    try:
        results = []
        for loss in losses:
            model = torch.nn.parallel.DistributedDataParallel(TiedModel())
            model(*share(rank), loss).backward()
            results.append([p.grad for p in model.module.parameters()])
        torch.save(results, os.path.join(folder, f"{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()
