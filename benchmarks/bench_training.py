"""The head in training: forward and backward against the eager head, and what a graph holds.

    python benchmarks/bench_training.py --out benchmarks/results/training_cpu.csv

Three heads on the same hidden states of a ragged batch, float32, elu1p:

- `eager`: linear layer on padded `[B, L]`, activation, mask, max over L, as published code does.
- `dense`: `project_pool`, gradient of all columns (VDR's document side).
- `gated`: top-k selection without gradient, then the kept products again with it (k = 256).

Loss: weights times fixed random numbers. First the losses and gradients of `eager` and `dense` are
compared, and those of `gated` with eager's at the columns it keeps; nothing is timed if they
differ. Time: forward and backward, a round of each in turn. Graph: bytes of all tensors saved for
the backward pass, inputs not counted. Peak: resident memory above the inputs, in a fresh process
each. `faster` (by the wall clock), `less processor` and `smaller graph` are eager's numbers over an
arm's own, times within a round.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from measure import Row, clock_in_turn, peak_bytes, rows_of, write_csv
from torch import Tensor

from vdr_db.kernels import project_pool
from vdr_db.training.sparse_ops import GatedRows, gate, pick_logits, weigh, winning_tokens

COLUMNS, KEPT = 30_522, 256
SHAPES = {"bert-tiny": (128, 32, 128), "bert-base": (768, 16, 128)}
"""Name -> hidden size, texts, longest text in tokens."""
ARMS = ("eager", "dense", "gated")
LEAVES = ("hidden", "weight", "bias")
TOLERANCE = 1e-4
"""Most relative difference (L2) of a loss or gradient."""


@dataclass(frozen=True)
class Inputs:
    """Hidden states of a ragged batch, the vocabulary matrix, and the loss's factors."""

    hidden: Tensor
    bounds: Tensor
    weight: Tensor
    bias: Tensor
    factors: Tensor
    lengths: Tensor


def make_inputs(shape: str) -> Inputs:
    """Random numbers; lengths spread evenly from a quarter of the longest to the longest."""
    H, B, L = SHAPES[shape]
    generator = torch.Generator().manual_seed(5)
    lengths = torch.linspace(L / 4, L, B).round().long()
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    return Inputs(
        normal(int(bounds[-1]), H).requires_grad_(),
        bounds,
        (normal(COLUMNS, H) / H**0.5).requires_grad_(),
        normal(COLUMNS).requires_grad_(),
        normal(B, COLUMNS),
        lengths,
    )


def eager(inputs: Inputs) -> Tensor:
    """Loss through `[B, L, V]`."""
    padded = torch.nn.utils.rnn.pad_sequence(
        list(inputs.hidden.split(inputs.lengths.tolist())), batch_first=True
    )
    inside = torch.arange(padded.shape[1]) < inputs.lengths[:, None]
    logits = torch.nn.functional.linear(padded, inputs.weight, inputs.bias)
    weights = torch.nn.functional.elu(logits) + 1
    weights = weights * inside[..., None]
    return (weights.max(dim=1).values * inputs.factors).sum()


def dense(inputs: Inputs) -> Tensor:
    """Loss through `[B, V]`."""
    logits = project_pool(inputs.hidden, inputs.bounds, inputs.weight, inputs.bias).logits
    return (weigh(logits, "elu1p") * inputs.factors).sum()


@torch.no_grad()
def kept_columns(inputs: Inputs) -> tuple[GatedRows, Tensor]:
    """The columns kept of each text, and the token of the batch that gave each its score."""
    logits = project_pool(inputs.hidden, inputs.bounds, inputs.weight, inputs.bias).logits
    kept = gate(logits, KEPT)
    rows = GatedRows(kept.indptr, kept.columns.long(), kept.weights, COLUMNS)
    spans = torch.stack([inputs.bounds[:-1], inputs.bounds[1:]], dim=1)
    return rows, winning_tokens(inputs.hidden, spans, inputs.weight, rows.indptr, rows.columns)


def gated(inputs: Inputs) -> Tensor:
    """Loss through `[B, k]`."""
    rows, tokens = kept_columns(inputs)
    picked = pick_logits(inputs.hidden, inputs.weight, inputs.bias, tokens, rows.columns)
    return (weigh(picked, "elu1p") * inputs.factors[rows.rows, rows.columns]).sum()


HEADS: dict[str, Callable[[Inputs], Tensor]] = {"eager": eager, "dense": dense, "gated": gated}


def step(head: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
    """Forward and backward."""
    for tensor in (inputs.hidden, inputs.weight, inputs.bias):
        tensor.grad = None
    head(inputs).backward()


def graph_bytes(head: Callable[[Inputs], Tensor], inputs: Inputs) -> int:
    """Bytes saved for the backward pass, each storage once, inputs left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in vars(inputs).values()}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = head(inputs)
    total = sum(held.values())
    del loss
    return total


def refuse_if_wrong(inputs: Inputs) -> None:
    """Compares losses and gradients with the eager head's.

    Raises:
        SystemExit: They differ by more than float32 rounds.
    """
    rows, _ = kept_columns(inputs)
    factors = torch.zeros_like(inputs.factors)
    factors[rows.rows, rows.columns] = inputs.factors[rows.rows, rows.columns]
    at_kept = replace(inputs, factors=factors)
    for name, ours, peer in (("dense", inputs, inputs), ("gated", inputs, at_kept)):
        found, known = gradients(HEADS[name], ours), gradients(eager, peer)
        for what, mine, theirs in zip(("loss", *LEAVES), found, known, strict=True):
            # Sums of up to 30,522 products of numbers near 1; a token's maximum may be a tie.
            off = float((mine - theirs).norm() / theirs.norm())
            if not off < TOLERANCE:
                raise SystemExit(f"{name}: {what} differs from the eager head's by {off:.1e}")


def gradients(head: Callable[[Inputs], Tensor], inputs: Inputs) -> list[Tensor]:
    """The loss and its gradients by `LEAVES`."""
    leaves = [getattr(inputs, name) for name in LEAVES]
    loss = head(inputs)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def measure(shape: str, rounds: int) -> list[Row]:
    """Rows of one shape."""
    inputs = make_inputs(shape)
    refuse_if_wrong(inputs)
    samples: dict[str, dict[str, list[float]]] = {}
    arms = {name: lambda head=head: step(head, inputs) for name, head in HEADS.items()}
    for name, times in clock_in_turn(arms, rounds).items():
        samples[name] = {"wall (ms)": times.wall, "processor (ms)": times.processor}
    for name, head in HEADS.items():
        samples[name]["graph (MB)"] = [graph_bytes(head, inputs) / 1e6]
        command = [sys.executable, __file__, "--peak", shape, name]
        peaks = [int(subprocess.run(command, check=True, capture_output=True).stdout)]
        samples[name]["peak (MB)"] = [peak / 1e6 for peak in peaks]
    for name in ARMS[1:]:
        own, peer = samples[name], samples["eager"]
        pairs = {
            "faster (x)": "wall (ms)",
            "less processor (x)": "processor (ms)",
            "smaller graph (x)": "graph (MB)",
        }
        for ratio, of in pairs.items():
            own[ratio] = [theirs / mine for mine, theirs in zip(own[of], peer[of], strict=True)]
    sizes = "x".join(map(str, SHAPES[shape]))
    return [
        row
        for name in ARMS
        for row in rows_of("head_training", name, f"{shape} {sizes}", "float32", samples[name])
    ]


def main() -> None:
    """Measures, prints, and writes where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--peak", nargs=2, metavar=("SHAPE", "ARM"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.peak:
        shape, name = arguments.peak
        inputs = make_inputs(shape)
        print(peak_bytes(lambda: step(HEADS[name], inputs)))
        return
    rows = [row for shape in arguments.shapes for row in measure(shape, arguments.rounds)]
    for row in rows:
        print(f"{row.shape:24} {row.backend:6} {row.metric:14} {row.median:>10} {row.unit}")
    if arguments.out:
        write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
