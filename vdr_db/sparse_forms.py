"""Sparse rows in other forms: dictionaries, torch tensors, and files.

Everything here takes or gives the plain arrays of `SparseRows`, which checks them.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vdr_db.errors import ConfigError, InputError, ShapeError
from vdr_db.sparse_checks import IntArray, row_pointers

__all__ = ["arrays_of_dicts", "arrays_of_tensor", "read_arrays", "write_arrays"]

Arrays: TypeAlias = tuple[IntArray, npt.NDArray[Any], npt.NDArray[Any]]
"""`indptr` `[N + 1]`, token ids and weights `[nnz]`."""

FILE_FORMAT = 1


def arrays_of_dicts(rows: Sequence[Mapping[int, float]], width: int) -> Arrays:
    """Arrays of `SparseRows.from_dicts`, which tells the errors."""
    if isinstance(rows, Mapping):
        raise TypeError("`rows` must be a sequence of mappings, got one mapping; pass [mapping]")
    counts = np.zeros(len(rows), np.int64)
    ids: list[int] = []
    weights: list[float] = []
    for i, row in enumerate(rows):
        entries = []
        for key, weight in row.items():
            if isinstance(key, bool) or not isinstance(key, (int, np.integer)):
                raise InputError(
                    f"token ids must be integers, got {key!r} in row {i}; "
                    "`Vocabulary.id(token)` turns a token into its id."
                )
            number = _finite_number(weight, i, int(key))
            if number != 0:
                entries.append((int(key), number))
        entries.sort()
        counts[i] = len(entries)
        ids.extend(key for key, _ in entries)
        weights.extend(weight for _, weight in entries)
    out_of_range = next((key for key in ids if not 0 <= key < width), None)
    if out_of_range is not None:
        raise InputError(
            f"token ids must lie in [0, {width}), got {out_of_range}; "
            "the rows come from another vocabulary."
        )
    return row_pointers(counts), np.array(ids, np.int32), np.array(weights, np.float64)


def arrays_of_tensor(tensor: Any) -> Arrays:
    """Arrays of `SparseRows.from_torch`, which tells the errors."""
    if getattr(tensor, "ndim", None) != 2:
        raise ShapeError(
            "a two-dimensional torch tensor is expected, got "
            f"{list(getattr(tensor, 'shape', [])) or type(tensor).__name__}."
        )
    tensor = tensor.detach().cpu()
    layout = str(tensor.layout)
    if layout == "torch.strided":
        tensor = tensor.float()
        rows, ids = tensor.nonzero(as_tuple=True)
        values = tensor[rows, ids].numpy()
    else:
        coo = (tensor if layout == "torch.sparse_coo" else tensor.to_sparse_coo()).coalesce()
        rows, ids = coo.indices()
        values = coo.values().float().numpy()
    rows, ids = rows.numpy(), ids.numpy()
    kept = values != 0
    counts = np.bincount(rows[kept], minlength=tensor.shape[0]).astype(np.int64)
    return row_pointers(counts), ids[kept], values[kept]


def write_arrays(path: str | os.PathLike[str], **arrays: npt.ArrayLike) -> None:
    """Writes a NumPy `.npz` file; an earlier file is replaced at once, never half."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            np.savez(file, format=np.int64(FILE_FORMAT), **arrays)  # type: ignore[arg-type]
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def read_arrays(path: str | os.PathLike[str]) -> tuple[Arrays, int]:
    """Arrays and width that `SparseRows.save` wrote; `SparseRows.load` tells the errors."""
    expected = {"format", "indptr", "indices", "values", "width"}
    arrays: dict[str, npt.NDArray[Any]] = {}
    try:
        with Path(path).open("rb") as handle:
            file = np.load(handle, allow_pickle=False)
            if set(getattr(file, "files", ())) == expected:
                arrays = {name: file[name] for name in expected}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{os.fspath(path)} cannot be read as sparse rows ({error}); "
            "it is damaged or something else: write it again."
        ) from error
    if not arrays:
        raise ConfigError(
            f"{os.fspath(path)} is not a file of sparse rows: it should hold the arrays "
            f"{sorted(expected)}; write one with `SparseRows.save`."
        )
    if int(arrays["format"]) != FILE_FORMAT:
        raise ConfigError(
            f"{os.fspath(path)} has format {int(arrays['format'])}, this version reads "
            f"{FILE_FORMAT}; use the library version that wrote it."
        )
    return (arrays["indptr"], arrays["indices"], arrays["values"]), int(arrays["width"])


def _finite_number(weight: Any, row: int, token_id: int) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = float("nan")
    if not (np.isfinite(number) and number >= 0):
        raise InputError(
            f"weights must be finite and not negative, got {weight!r} for token id {token_id} in "
            f"row {row}; leave absent tokens out, and look for NaN in the model."
        )
    return number
