"""The head on the CPU: packed projection, pooling, gradient and selection against eager torch.

    python benchmarks/bench_head_cpu.py --out benchmarks/results/head_cpu.csv

First checks the results at these very shapes: error against float64 within eager's own plus 1e-5,
each text alone = in the batch bit for bit, selection = reference. If one check is red, nothing is
timed. Then eager, the CPU path, and one square sgemm run in turn in one process; ratios are taken
round by round. On a machine that others use too, `--threads 1` and its processor times are the
numbers to trust. Memory is measured in fresh processes (`measure.peak_bytes`).

Eager is what one writes without this library: padded hidden states times the matrix, `elu(x) + 1`,
zeros at the padding, `amax`. It gets its padded input for free.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from measure import Row, Times, clock_in_turn, peak_bytes, rows_of, write_csv
from shapes import HEAD_CPU, Shape
from torch import Tensor

from vdr_db.kernels import activate, project_pool, reference, select_topk

SGEMM_SIZE = 2048
EPSILON = 1e-5
K = 768
MEGABYTE = 1 << 20


class Inputs(NamedTuple):
    """Tensors of one shape."""

    hidden: Tensor
    cu_seqlens: Tensor
    weight: Tensor
    padded: Tensor
    mask: Tensor
    grad: Tensor


def make_inputs(shape: Shape) -> Inputs:
    """Random hidden states as a LayerNorm leaves them, weights as large as an embedding's."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(shape.lengths)
    hidden = torch.randn((shape.T, shape.H), generator=generator)
    weight = torch.randn((shape.V, shape.H), generator=generator) * 0.05
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = torch.zeros((*mask.shape, shape.H)).masked_scatter(mask[:, :, None], hidden)
    grad = torch.randn((len(lengths), shape.V), generator=generator)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return Inputs(hidden, bounds, weight, padded, mask, grad)


def eager(padded: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Weights `[B, V]`, through `[B, L, V]`."""
    weights = torch.nn.functional.elu(torch.nn.functional.linear(padded, weight)) + 1
    return weights.masked_fill(~mask[:, :, None], 0).amax(1)


def packed(hidden: Tensor, cu_seqlens: Tensor, weight: Tensor) -> Tensor:
    """Weights `[B, V]`, through the library."""
    return activate(project_pool(hidden, cu_seqlens, weight, backend="cpu").logits, "elu1p")


def with_gradient(
    forward: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden: Tensor,
    other: Tensor,
    weight: Tensor,
    grad: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of hidden states and weights."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(forward(hidden, other, weight), (hidden, weight), grad)


def check(shape: Shape, inputs: Inputs) -> list[str]:
    """What is wrong with the results at this shape; empty if nothing is."""
    hidden, bounds, weight, padded, mask, grad = inputs
    wrong = []
    pooled = project_pool(hidden, bounds, weight, return_argmax=True, backend="cpu")
    exact = reference.project_pool(hidden.double(), bounds, weight.double())
    weights = activate(pooled.logits, "elu1p")
    exact_weights = activate(exact.logits, "elu1p")
    allowed = (eager(padded, mask, weight).double() - exact_weights).abs() + EPSILON
    if not ((weights.double() - exact_weights).abs() <= allowed).all():
        wrong.append("values")
    for b in range(len(shape.lengths)):
        document = hidden[bounds[b] : bounds[b + 1]]
        alone = project_pool(document, torch.tensor([0, len(document)]), weight, backend="cpu")
        if not torch.equal(alone.logits[0], pooled.logits[b]):
            wrong.append(f"text {b} alone")
    selected = select_topk(pooled.logits, K, activation="elu1p", backend="cpu")
    expected = reference.select_topk(pooled.logits, K, activation="elu1p")
    if not all(map(torch.equal, selected, expected)):
        wrong.append("selection")
    ours = with_gradient(packed, hidden, bounds, weight, grad)
    theirs = with_gradient(eager, padded, mask, weight, grad)
    for name, one, two in zip(
        ("hidden", "weight"), ours, (theirs[0][mask], theirs[1]), strict=True
    ):
        if not torch.allclose(one, two, rtol=1e-3, atol=1e-3 * float(two.abs().max())):
            wrong.append(f"gradient of {name}")
    return wrong


def measure(shape: Shape, inputs: Inputs, rounds: int) -> list[Row]:
    """Times, rates and ratios of one shape."""
    hidden, bounds, weight, padded, mask, grad = inputs
    square = torch.randn(SGEMM_SIZE, SGEMM_SIZE)
    product = torch.empty_like(square)
    logits = project_pool(hidden, bounds, weight).logits
    times = clock_in_turn(
        {
            "sgemm": lambda: torch.mm(square, square, out=product),
            "forward": lambda: packed(hidden, bounds, weight),
            "forward eager": lambda: eager(padded, mask, weight),
            "forward+backward": lambda: with_gradient(packed, hidden, bounds, weight, grad),
            "forward+backward eager": lambda: with_gradient(eager, padded, mask, weight, grad),
            "select": lambda: select_topk(logits, K, activation="elu1p"),
            "select eager": lambda: torch.topk(torch.nn.functional.elu(logits) + 1, K, dim=1),
        },
        rounds,
    )
    samples = {
        ("sgemm", "mkl"): rates(times["sgemm"], 2 * SGEMM_SIZE**3),
        ("project_pool", "cpu"): durations(times["forward"])
        | rates(times["forward"], shape.flop)
        | ratios("share of sgemm", times["forward"], times["sgemm"], shape.flop),
        ("project_pool forward+backward", "cpu"): durations(times["forward+backward"]),
        (f"select_topk k={K}", "cpu"): durations(times["select"]),
        ("project_pool", "eager"): durations(times["forward eager"]),
        ("project_pool forward+backward", "eager"): durations(times["forward+backward eager"]),
        (f"select_topk k={K}", "eager"): durations(times["select eager"]),
    }
    for (op, backend), numbers in samples.items():
        if backend == "cpu":
            arm = {"project_pool": "forward", f"select_topk k={K}": "select"}
            name = arm.get(op, "forward+backward")
            numbers |= ratios("speedup over eager", times[name], times[f"{name} eager"])
    return [
        row
        for (op, backend), numbers in samples.items()
        for row in rows_of(op, backend, str(shape), "float32", numbers)
    ]


def durations(times: Times) -> dict[str, list[float]]:
    """Both clocks, in milliseconds."""
    return {"time (ms)": times.wall, "processor time (ms)": times.processor}


def rates(times: Times, flop: int) -> dict[str, list[float]]:
    """GFLOP/s over real tokens: flop / ms / 1e6."""
    return {
        "rate (GFLOP/s)": [flop / ms / 1e6 for ms in times.wall],
        "processor rate (GFLOP/s)": [flop / ms / 1e6 for ms in times.processor],
    }


def ratios(
    metric: str, ours: Times, other: Times, flop: int = 2 * SGEMM_SIZE**3
) -> dict[str, list[float]]:
    """The other's time over ours, round by round, for work of `flop` where the other is sgemm."""
    work = flop / (2 * SGEMM_SIZE**3)
    return {
        f"{metric} (x)": [work * b / a for a, b in zip(ours.wall, other.wall, strict=True)],
        f"{metric}, processor time (x)": [
            work * b / a for a, b in zip(ours.processor, other.processor, strict=True)
        ],
    }


def memory(shape: Shape, arm: str) -> float:
    """Megabytes above inputs and result, in this process, which should be a fresh one."""
    inputs = make_inputs(shape)
    calls: dict[str, Callable[[Inputs], object]] = {
        "cpu": lambda x: packed(x.hidden, x.cu_seqlens, x.weight),
        "eager": lambda x: eager(x.padded, x.mask, x.weight),
        "cpu forward+backward": lambda x: with_gradient(
            packed, x.hidden, x.cu_seqlens, x.weight, x.grad
        ),
        "eager forward+backward": lambda x: with_gradient(
            eager, x.padded, x.mask, x.weight, x.grad
        ),
    }
    # Code pages and thread stacks become resident here, not in the measurement.
    calls[arm](make_inputs(Shape("small", (3, 2), 16, 64)))
    results = len(shape.lengths) * shape.V
    if "backward" in arm:
        results = shape.V * shape.H
        results += inputs.padded.numel() if "eager" in arm else inputs.hidden.numel()
    return (peak_bytes(lambda: calls[arm](inputs)) - 4 * results) / MEGABYTE


def memory_rows(shape: Shape, rounds: int = 3) -> list[Row]:
    """Memory of each arm, each round in a process of its own."""
    rows = []
    for arm in ("cpu", "eager", "cpu forward+backward", "eager forward+backward"):
        command = [sys.executable, __file__, "--memory", arm, "--shape", shape.name]
        command += ["--threads", str(torch.get_num_threads())]
        numbers = [
            float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for _ in range(rounds)
        ]
        backend, _, rest = arm.partition(" ")
        op = f"project_pool {rest}".strip()
        rows += rows_of(op, backend, str(shape), "float32", {"memory above (MiB)": numbers})
    return rows


def main() -> int:
    """Checks, measures, prints and stores."""
    parser = argparse.ArgumentParser(description="CPU head against eager torch")
    parser.add_argument("--rounds", type=int, default=7)
    names = [shape.name for shape in HEAD_CPU]
    parser.add_argument("--shape", choices=names, help="only the shape of this name")
    parser.add_argument("--threads", type=int, help="of torch; default: all cores")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--append", action="store_true", help="add to the CSV")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes = [shape for shape in HEAD_CPU if options.shape in (None, shape.name)]
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory:
        print(memory(shapes[0], options.memory))
        return 0
    wrong = {shape.name: found for shape in shapes if (found := check(shape, make_inputs(shape)))}
    if wrong:
        print(f"results are wrong, so nothing is timed: {wrong}", file=sys.stderr)
        return 1
    rows = []
    for shape in shapes:
        print(f"{shape}, {torch.get_num_threads()} threads", flush=True)
        found = measure(shape, make_inputs(shape), options.rounds)
        if shape.name.startswith("base"):
            found += memory_rows(shape)
        for row in found:
            print(
                f"  {row.op:30} {row.backend:6} {row.metric:20} "
                f"{row.median:10.4g} {row.unit:8} [{row.p20:.4g}, {row.p80:.4g}]",
                flush=True,
            )
        rows += found
    if options.out:
        write_csv(options.out, rows, append=options.append)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
