"""Weights where they lie: in a safetensors file, read without torch and only as far as needed.

Source of the format: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vdr_db.errors import ConfigError

__all__ = ["RoundedTensor", "SharedMatrix", "StoredTensor", "header_digest", "stored_tensors"]

FloatArray = npt.NDArray[np.float32]

_DTYPES: dict[str, np.dtype[np.generic]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # the upper half of a float32
    "I8": np.dtype("i1"),
}
_MOST_HEADER_BYTES = 100_000_000
"""As the format's own library has it."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: The file.
        dtype: `"F64"`, `"F32"`, `"F16"`, `"BF16"` or `"I8"`.
        shape: Its shape.
        offset: First byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return _DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.itemsize

    def mapped(self) -> npt.NDArray[Any]:
        """The tensor where it lies, as a map of the file; bfloat16 as its bits, in uint16.

        Raises:
            ConfigError: The file changed or is damaged.
        """
        try:
            mapped = np.memmap(self.file, _DTYPES[self.dtype], "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.file} cannot be read at byte {self.offset}: {error}; fetch it again."
            ) from error
        return np.asarray(mapped)

    def read(self, rows: npt.NDArray[np.int64] | slice | None = None) -> FloatArray:
        """The tensor in memory, float32.

        Args:
            rows: Places along the first axis; None for all.

        Raises:
            ConfigError: The file changed or is damaged.
        """
        # Opened for each read: a map that stayed open would count as memory of the process.
        mapped = self.mapped()
        chosen = mapped if rows is None else mapped[rows]
        if self.dtype == "BF16":
            return (chosen.astype(np.uint32) << 16).view(np.float32)
        return chosen.astype(np.float32)


@dataclass(frozen=True)
class RoundedTensor:
    """Rows of 8 bit integers, each with a scale.

    Attributes:
        integers: `[M, H]`.
        scales: `[M]`, what one step of a row stands for.
    """

    integers: StoredTensor
    scales: StoredTensor

    def read(self, rows: npt.NDArray[np.int64] | slice | None = None) -> FloatArray:
        """The rows in memory, float32; see `StoredTensor.read`."""
        found = self.integers.read(rows)
        found *= self.scales.read(rows)[:, None]
        return found


@dataclass(frozen=True)
class SharedMatrix:
    """Rows of a tensor of another folder, some of them replaced by rows of a second tensor.

    Attributes:
        lent: `[N, H]`, of the other folder.
        chosen: `[V]`, which of its rows these are.
        own: `[M, H]`, what replaces; None for nothing.
        places: `[M]`, which of the V rows are replaced, each once.
    """

    lent: StoredTensor
    chosen: npt.NDArray[np.int64]
    own: StoredTensor | RoundedTensor | None
    places: npt.NDArray[np.int64]

    dtype = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """`(V, H)`."""
        return (self.chosen.size, *self.lent.shape[1:])

    def read(self, rows: npt.NDArray[np.int64] | slice | None = None) -> FloatArray:
        """The rows in memory, float32; see `StoredTensor.read`."""
        asked = np.arange(self.chosen.size)[slice(None) if rows is None else rows]
        found = self.lent.read(self.chosen[asked])
        if self.own is not None:
            replaced = np.full(self.chosen.size, -1)
            replaced[self.places] = np.arange(self.places.size)
            replaced = replaced[asked]
            found[replaced >= 0] = self.own.read(replaced[replaced >= 0])
        return found

    mapped = read


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Tensors of floats and bytes in a safetensors file, by name; no tensor is read.

    Raises:
        ConfigError: The file is no such file, or is cut short.
    """
    header = _header(file)
    start, size = 8 + len(header), file.stat().st_size
    found: dict[str, StoredTensor] = {}
    try:
        for name, entry in json.loads(header, object_pairs_hook=_once).items():
            if name == "__metadata__" or entry["dtype"] not in _DTYPES:
                continue
            first, last = entry["data_offsets"]
            tensor = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), start + first)
            if first < 0 or tensor.nbytes != last - first or start + last > size:
                raise ValueError(f"`{name}` does not fit its place")
            found[name] = tensor
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} cannot be read as a file of weights: {error}; it is damaged or cut short, so "
            "fetch it again."
        ) from error
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`{twice}` stands in it twice")
    return dict(pairs)


def header_digest(file: Path) -> str:
    """SHA-256 (hex) of the names, shapes and places of all weights in a safetensors file.

    Raises:
        ConfigError: The file is no such file.
    """
    return hashlib.sha256(_header(file)).hexdigest()


def _header(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_MOST_HEADER_BYTES, file.stat().st_size):
                raise ValueError(f"its header is said to have {length} bytes")
            return stream.read(length)
    except (OSError, ValueError, struct.error) as error:
        raise ConfigError(
            f"{file} cannot be read as a file of weights: {error}; it is damaged or cut short, so "
            "fetch it again."
        ) from error
