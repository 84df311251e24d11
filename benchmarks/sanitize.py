"""Runs every kernel once, small, under NVIDIA's compute-sanitizer.

    python benchmarks/sanitize.py            # memcheck, racecheck, initcheck; needs a CUDA device
    python benchmarks/sanitize.py --dry-run  # the same calls on the CPU, by Triton's interpreter

Tensors are allocated one by one, without torch's cache: a read behind a tensor is then a read
behind an allocation, which memcheck sees.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

TOOLS = ("memcheck", "racecheck", "initcheck")
LENGTHS = {"packed": [5, 0, 17, 1, 33], "aligned": [130, 0, 257]}
V, H = 300, 72
# Triton's interpreter runs a program at a time, in NumPy: seconds instead of minutes.
DRY_LENGTHS = {"packed": [5, 0, 2], "aligned": [130]}
DRY_V, DRY_H = 40, 24


def run_all(device: str) -> None:
    """Every kernel: both layouts, both methods of the gradients, kept entries, and selections."""
    import torch

    from vdr_db.kernels.cuda import pooling, scan
    from vdr_db.kernels.cuda.configs import SelectTiles

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    is_dry = device == "cpu"
    vocabulary, width = (DRY_V, DRY_H) if is_dry else (V, H)
    tiles = SelectTiles(row_block=128, part_block=128, loop_block=64, chunk=64)
    for lengths in (DRY_LENGTHS if is_dry else LENGTHS).values():
        for dtype in (torch.float32,) if is_dry else (torch.float32, torch.float16):
            cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
            hidden, weight = (
                random(sum(lengths), width).to(dtype),
                random(vocabulary, width).to(dtype),
            )
            hidden[-1] = torch.inf  # a maximum to search for
            pooling.forward(hidden, cu_seqlens, weight, random(vocabulary))
            scan.scan(
                scan.encoded(weight), hidden, cu_seqlens, weight, k=7, activation="log1p_relu"
            )
            logits, argmax = pooling.forward(hidden, cu_seqlens, weight, None, True)
            assert argmax is not None
            for method in ("gather", "onehot"):
                pooling.backward(
                    *(random(*logits.shape), argmax, hidden, cu_seqlens, weight),
                    need_bias=True,
                    method=method,
                )
            rows = torch.arange(len(lengths) + 1, device=device)
            for k in (7, None) if is_dry else (7, 200, None):
                indptr, columns, weights = pooling.select_topk(
                    *(logits, k), activation="elu1p", lexical=(rows, rows[1:]), tiles=tiles
                )
                texts = torch.repeat_interleave(rows[:-1], indptr.diff())
                pooling.backward_sparse(
                    *(weights, indptr, columns, argmax[texts, columns.long()]),
                    *(hidden, cu_seqlens, weight),
                    need_bias=True,
                )
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    """1 if a tool found something, 2 if it or a device is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, without the tools")
    parser.add_argument("--here", action="store_true", help="on the device, without the tools")
    options = parser.parse_args(arguments)
    if options.dry_run or options.here:
        if options.dry_run:
            os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, hence before it
            from quick_interpreter import quicken_interpreter

            quicken_interpreter()
        run_all("cpu" if options.dry_run else "cuda")
        print("every kernel ran")
        return 0
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is missing; install the CUDA toolkit", file=sys.stderr)
        return 2
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in TOOLS:
        print(f"== {name}", flush=True)
        command = [tool, "--tool", name, "--error-exitcode", "1", "--target-processes", "all"]
        finished = subprocess.run(
            [*command, sys.executable, __file__, "--here"], env=environment, check=False
        )
        if finished.returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
