"""Small device functions shared by the Triton kernels, and the switches they need on the host.

An *ordered key* is the 32-bit integer whose signed order is the order of the float it came from:
the magnitude bits of negative numbers are flipped, -0 becomes +0 first, and every NaN becomes the
largest key. Maxima of keys are exact and associative, so they may be taken in any order, by atomics
too, without changing a bit.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# Device functions take what Triton traces; annotations on them would mean constants.

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "FIRST_KEY",
    "SIZES",
    "compute_capability",
    "descriptor",
    "fits_descriptor",
    "is_interpreted",
    "on_device",
    "shared_memory",
    "short_rows",
]

FIRST_KEY = -(2**63)
"""Start value of a 64-bit (logit, token) key: below the key of every logit, -inf included."""

SIZES = ["B", "T", "V", "k", "n", "nnz", "n_blocks", "n_chunks", "n_kept", "n_owners", "n_parts",
         "n_words", "split"]  # fmt: skip
"""Arguments that change from batch to batch; kernels are not compiled anew for special values."""


@triton.jit
def nan_max(left, right):
    """Larger of two; NaN if either is (the plain reduction drops NaN)."""
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def ordered_key(value):
    """Ordered int32 key of float32 `value`."""
    # x + 0.0 turns -0 into +0 and is not folded away
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(value != value, 0x7FFFFFFF, key)


@triton.jit
def value_of_key(key):
    """Float32 value of an ordered int32 key: the inverse of `ordered_key`."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def log1p_positive(value):
    """log(1 + value) for value >= 0, right to a few ulp also where 1 + value loses digits."""
    # from 2**24 on nothing of the logarithm is lost, and inf / inf must not become NaN
    bounded = tl.where(value > 16777216.0, 16777216.0, value)
    shifted = 1.0 + bounded
    lost = shifted == 1.0
    # log(u) * x / (u - 1) cancels the rounding of u = 1 + x
    corrected = tl.log(shifted) * (bounded / tl.where(lost, 1.0, shifted - 1.0))
    corrected = tl.where(lost, bounded, corrected)
    return tl.where(value > 16777216.0, tl.log(value), corrected)


@triton.jit
def activated(value, ACTIVATION: tl.constexpr):
    """`value` through the activation named by the constant; NaN stays NaN."""
    if ACTIVATION == "elu1p":
        return tl.where(value < 0.0, tl.exp(tl.minimum(value, 0.0)), value + 1.0)
    if ACTIVATION == "none":
        return value
    # NaN fails the comparison and so keeps its value
    positive = tl.where(value < 0.0, 0.0, value)
    once = log1p_positive(positive)
    if ACTIVATION == "double_log1p_relu":
        return log1p_positive(once)
    return once


@triton.jit
def largest_of_zero(ACTIVATION: tl.constexpr):
    """Largest logit whose weight is 0 or less; half of the smallest float32 rounds to 0."""
    return -103.972084 if ACTIVATION == "elu1p" else 0.0


@triton.jit
def grouped_tile(pid, n_rows, n_columns, GROUP: tl.constexpr):
    """(row, column) of a program when `GROUP` rows share each column strip before the next strip.

    Programs that run at the same time then read few distinct weight tiles, which stay in L2.
    """
    width = GROUP * n_columns
    group = pid // width
    first = group * GROUP
    size = tl.minimum(n_rows - first, GROUP)
    inside = pid - group * width
    return first + inside % size, inside // size


def is_interpreted(kernel: Any) -> bool:
    """True when `kernel` was decorated under `TRITON_INTERPRET=1` and so runs on CPU tensors."""
    return not isinstance(kernel, triton.runtime.JITFunction)


def compute_capability(tensor: Tensor) -> int:
    """Compute capability of a tensor's device, for example 90; 90 under the interpreter."""
    if tensor.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def shared_memory(tensor: Tensor) -> int:
    """Bytes of shared memory that one program may have on a tensor's device."""
    if tensor.device.type != "cuda":
        return 227 * 1024
    return _shared_memory(tensor.device.index)


@functools.cache
def _shared_memory(index: int) -> int:
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes a tensor's CUDA device current for launches; does nothing on the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def fits_descriptor(matrix: Tensor) -> bool:
    """True when a tensor descriptor (TMA) can read a matrix.

    The hardware wants unit stride in a row, and 16-byte multiples as base address and row pitch.
    """
    pitch = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and pitch > 0 and pitch % 16 == 0 and matrix.data_ptr() % 16 == 0


def short_rows(matrix: Tensor) -> Tensor:
    """A matrix `[n, H]`, copied if offsets within a row, 32 bits wide in kernels, could overflow.

    Only columns that lie far apart do: the transpose of a matrix with millions of columns.
    """
    reach = 2 * matrix.stride(1) * matrix.shape[1]  # the last tile may end behind the row
    return matrix if reach < 2**31 else matrix.contiguous()


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Descriptor of a matrix for tiles of `rows` x `columns`; reads past its end give 0."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
