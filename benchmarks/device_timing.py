"""Time and memory of calls on a CUDA device; on the CPU, where only dry runs happen, wall time.

On a device each call is captured in a CUDA graph where it can be, so that launches from Python do
not count; before every timed call 256 MB are written, so that no input lies in L2 by chance.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """Milliseconds of single calls, and how they were launched: "graph", "stream" or "host"."""

    milliseconds: list[float]
    launched: str


def time_calls(
    call: Callable[[], object], device: torch.device, *, use_graph: bool, budget_ms: float = 400.0
) -> Timing:
    """Times a call up to 50 times or until the budget is spent, but at least 3 times."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return Timing([(time.perf_counter() - start) * 1000], "host")
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    launched, replay = "stream", call
    if use_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        launched, replay = "graph", graph.replay
        replay()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    samples: list[float] = []
    while len(samples) < 3 or (len(samples) < 50 and sum(samples) < budget_ms):
        flush.zero_()
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end))
    return Timing(samples, launched)


def peak_bytes_above(call: Callable[[], object], device: torch.device) -> int:
    """Device memory that a call needs at its highest, results included; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak
