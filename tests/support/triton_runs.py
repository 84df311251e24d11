"""What the Triton tests share: where they run, error bounds, batches, and poisoned memory.

Kernels run on a CUDA device if there is one, else in a process of its own under Triton's
interpreter (`TRITON_INTERPRET=1`, set before any kernel is defined), which
`test_triton_interpreter.py` starts.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED or not torch.cuda.is_available() else "cuda"

MARKS = [
    pytest.mark.skipif(
        DEVICE == "cpu" and not IS_INTERPRETED,
        reason="no CUDA device; test_triton_interpreter.py runs these tests under the interpreter",
    ),
    # NumPy, which the interpreter computes with, warns about infinities; a device does not.
    pytest.mark.filterwarnings(
        "ignore:(invalid value|divide by zero|overflow|All-NaN):RuntimeWarning"
    ),
]

# On a device, so do the products of bfloat16; the interpreter proves indexing in two dtypes.
DTYPES = [torch.float32, torch.float16] + ([] if IS_INTERPRETED else [torch.bfloat16])

EPSILON = 1e-5
"""Added to what eager torch loses in the same dtype: float32 sums of a few hundred terms near 1."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to a dtype."""
    return torch.finfo(dtype).eps / 2


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers rounded to a dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def bounds(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """Running sum of text lengths on the device."""
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype).to(DEVICE)


def eager_pool(hidden: Tensor, cu_seqlens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits by whole products in the dtype of the inputs, as written without this library."""
    rows = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        if start == end:
            rows.append(hidden.new_full((weight.shape[0],), -torch.inf))
        else:
            rows.append((hidden[start:end] @ weight.T).amax(0))
    logits = torch.stack(rows).float()
    return logits if bias is None else logits + bias.float()


def assert_no_worse(got: Tensor, eager: Tensor, truth: Tensor, slack: Tensor | float = 0.0) -> None:
    """|got - truth| <= |eager - truth| + EPSILON + slack, element by element; equal infinities."""
    finite = truth.isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert torch.equal(got[~finite].double(), truth[~finite])
    excess = (got.double() - truth).abs() - (eager.double() - truth).abs() - EPSILON - slack
    assert not (excess[finite] > 0).any(), f"worst excess {excess[finite].max():.2e}"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh memory with NaN, or an impossible integer, so that nothing unwritten can pass."""

    def poison(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        return tensor.fill_(torch.iinfo(tensor.dtype).max // 3)

    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _plain=plain, **k: poison(_plain(*a, **k)))
    plain_new = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(plain_new(*a, **k)))


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> None:
    """The interpreter does what it does once, and by NumPy."""
    if IS_INTERPRETED:
        with pytest.MonkeyPatch.context() as patched:
            patched.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
            from quick_interpreter import quicken_interpreter

            quicken_interpreter()
