"""`SparseRows`: sparse vectors over token ids, the one type that crosses borders in this library.

A batch of rows in compressed sparse row (CSR) form. Encoders return it, stores take it, metrics and
files speak it. Dimensions are always token ids of the tokenizer, whatever part of the vocabulary a
model computes, so rows of different models over one tokenizer share one space.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from vdr_db.errors import ConfigError, InputError, ShapeError, require
from vdr_db.sparse_checks import (
    IdArray,
    IntArray,
    WeightArray,
    checked_arrays,
    checked_width,
    row_pointers,
)
from vdr_db.sparse_forms import arrays_of_dicts, arrays_of_tensor, read_arrays, write_arrays

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["SparseRows"]

FloatArray = npt.NDArray[np.float64]

_GATHER_ELEMENTS = 1 << 22  # elements gathered at once in `dot_dense`: 32 MB of float64


class _Names(Protocol):
    def token(self, token_id: int, /) -> str: ...


class SparseRows:
    """N sparse vectors with positive weights over `width` token ids.

    Invariants, checked once at construction: `indptr` starts at 0 and never falls; the indices of
    a row are unique and ascending, in `[0, width)`; values are finite and greater than 0. A row may
    be empty, anywhere. Instances are read-only; the arrays are taken over, not copied, so do not
    write to them afterwards.

    Attributes:
        indptr: `[N + 1]` int64; row i is `indices[indptr[i]:indptr[i + 1]]`.
        indices: `[nnz]` int32, token ids.
        values: `[nnz]` float32, weights.
        width: Number of token ids, the vocabulary size of the tokenizer.
    """

    __slots__ = ("indices", "indptr", "values", "width")
    __hash__ = None  # type: ignore[assignment]

    indptr: IntArray
    indices: IdArray
    values: WeightArray
    width: int

    def __init__(
        self,
        indptr: npt.ArrayLike,
        indices: npt.ArrayLike,
        values: npt.ArrayLike,
        width: int,
    ) -> None:
        """Checks the invariants and takes the arrays over.

        Raises:
            ShapeError: Sizes or dtypes disagree.
            InputError: An index is out of range, repeated or out of order, or a value is not a
                finite number greater than 0; the message names the row.
        """
        self._take(*checked_arrays(indptr, indices, values, width))

    def _take(self, indptr: IntArray, indices: IdArray, values: WeightArray, width: int) -> None:
        for name, array in (("indptr", indptr), ("indices", indices), ("values", values)):
            view = array.view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)
        object.__setattr__(self, "width", width)

    @classmethod
    def _trusted(
        cls, indptr: IntArray, indices: IdArray, values: WeightArray, width: int
    ) -> SparseRows:
        """Rows cut from checked rows, which hold the invariants by construction."""
        rows = cls.__new__(cls)
        rows._take(indptr, indices, values, width)
        return rows

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses: rows are read-only."""
        raise AttributeError(f"SparseRows is read-only; make a new one instead of setting `{name}`")

    def __reduce__(self) -> tuple[type[SparseRows], tuple[IntArray, IdArray, WeightArray, int]]:
        """Pickles through the constructor, so that unpickled rows are checked too."""
        return SparseRows, (self.indptr, self.indices, self.values, self.width)

    # Size and access

    def __len__(self) -> int:
        """Number of rows N."""
        return int(self.indptr.size - 1)

    @property
    def nnz(self) -> int:
        """Number of stored entries of all rows."""
        return int(self.indices.size)

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, width)`."""
        return len(self), self.width

    @property
    def counts(self) -> IntArray:
        """Entries of each row, `[N]` int64."""
        return np.diff(self.indptr)

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return int(self.indptr.nbytes + self.indices.nbytes + self.values.nbytes)

    def row(self, i: int) -> tuple[IdArray, WeightArray]:
        """Token ids (ascending) and weights of row `i`; a negative `i` counts from the end.

        Raises:
            IndexError: There is no such row.
        """
        i = self._row_number(i)
        span = slice(int(self.indptr[i]), int(self.indptr[i + 1]))
        return self.indices[span], self.values[span]

    def __getitem__(self, key: int | slice | Sequence[int] | npt.NDArray[Any], /) -> SparseRows:
        """The chosen rows, always as `SparseRows`: by number, slice, integer or boolean array.

        Raises:
            IndexError: A row number is out of range, or a boolean array is not `[N]` long.
        """
        if isinstance(key, (int, np.integer)):
            i = self._row_number(int(key))
            key = slice(i, i + 1)
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                stop = max(start, stop)
                span = slice(int(self.indptr[start]), int(self.indptr[stop]))
                indptr = self.indptr[start : stop + 1] - self.indptr[start]
                return self._trusted(indptr, self.indices[span], self.values[span], self.width)
            step = min(max(step, -len(self) - 1), len(self) + 1)  # NumPy takes 64 bits, slices any
            chosen = np.arange(start, stop, step)
        else:
            chosen = np.asarray(key)
            if chosen.size == 0:
                chosen = chosen.astype(np.int64)
            if chosen.dtype == np.bool_:
                if chosen.shape != (len(self),):
                    raise IndexError(
                        f"a boolean index must be [{len(self)}] long, got {list(chosen.shape)}"
                    )
                chosen = np.flatnonzero(chosen)
        if chosen.ndim != 1 or not np.issubdtype(chosen.dtype, np.integer):
            raise IndexError(
                "rows are chosen by a number, a slice, or a flat array of integers or booleans, "
                f"got {chosen.dtype} {list(chosen.shape)}"
            )
        if chosen.size and (chosen.min() < -len(self) or chosen.max() >= len(self)):
            raise IndexError(f"row numbers must lie in [-{len(self)}, {len(self)})")
        chosen = np.where(chosen < 0, chosen + len(self), chosen).astype(np.int64)
        counts = self.counts[chosen]
        indptr = row_pointers(counts)
        offsets = np.repeat(self.indptr[chosen] - indptr[:-1], counts)
        source = offsets + np.arange(indptr[-1])
        return self._trusted(indptr, self.indices[source], self.values[source], self.width)

    def __iter__(self) -> Iterator[SparseRows]:
        """One-row `SparseRows`, in order."""
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        """Sizes only."""
        mean = self.nnz / len(self) if len(self) else 0.0
        return f"SparseRows({len(self)} rows x {self.width}, {mean:.1f} non-zeros a row)"

    def __eq__(self, other: object) -> bool:
        """Same width, same rows, bit for bit."""
        if not isinstance(other, SparseRows):
            return NotImplemented
        return (
            self.width == other.width
            and np.array_equal(self.indptr, other.indptr)
            and np.array_equal(self.indices, other.indices)
            and np.array_equal(self.values, other.values)
        )

    def allclose(self, other: SparseRows, *, rtol: float = 1e-6, atol: float = 0.0) -> bool:
        """Same rows and token ids, with weights equal up to a tolerance."""
        return (
            self.width == other.width
            and np.array_equal(self.indptr, other.indptr)
            and np.array_equal(self.indices, other.indices)
            and np.allclose(self.values, other.values, rtol=rtol, atol=atol)
        )

    # Making and joining

    @classmethod
    def empty(cls, count: int, width: int) -> SparseRows:
        """`count` rows without entries."""
        width = checked_width(width)
        indptr, nothing = np.zeros(count + 1, np.int64), np.zeros(0, np.float32)
        return cls._trusted(indptr, nothing.astype(np.int32), nothing, width)

    @staticmethod
    def concat(parts: Sequence[SparseRows]) -> SparseRows:
        """All rows of all parts, in order.

        Raises:
            InputError: There is no part, so the width is unknown.
            ShapeError: Widths differ.
        """
        if not parts:
            raise InputError(
                "`concat` needs at least one `SparseRows`, got none; for no rows of a known width "
                "use `SparseRows.empty(0, width)`."
            )
        widths = sorted({part.width for part in parts})
        if len(widths) > 1:
            raise ShapeError(
                f"all parts must have one width, got {widths}; "
                "rows over different vocabularies cannot be joined."
            )
        if len(parts) == 1:  # read-only, so it can be shared
            return parts[0]
        indptr = row_pointers(np.concatenate([part.counts for part in parts]))
        indices = np.concatenate([part.indices for part in parts])
        values = np.concatenate([part.values for part in parts])
        return SparseRows._trusted(indptr, indices, values, widths[0])

    @classmethod
    def from_dicts(cls, rows: Sequence[Mapping[int, float]], width: int) -> SparseRows:
        """Rows from `{token id: weight}` mappings; a weight of 0 means absent and is left out.

        Raises:
            TypeError: One mapping came instead of a sequence of them.
            InputError: A key is not an integer in `[0, width)`, or a weight is not a finite number
                greater than or equal to 0.
        """
        return cls(*arrays_of_dicts(rows, width), width)

    def to_dicts(self) -> list[dict[int, float]]:
        """`{token id: weight}` of each row, ids ascending."""
        pairs = (self.row(i) for i in range(len(self)))
        return [dict(zip(ids.tolist(), weights.tolist(), strict=True)) for ids, weights in pairs]

    @classmethod
    def from_scipy(cls, matrix: Any) -> SparseRows:
        """Rows of a SciPy sparse matrix or array; repeated entries are summed, zeros left out.

        Raises:
            ShapeError: It is not a two-dimensional sparse matrix.
            InputError: A value is negative or not finite.
        """
        if not (hasattr(matrix, "tocsr") and getattr(matrix, "ndim", 2) == 2):
            raise ShapeError(
                f"a two-dimensional SciPy sparse matrix is expected, got {type(matrix).__name__}; "
                "for dictionaries use `from_dicts`, for tensors `from_torch`."
            )
        csr = matrix.tocsr(copy=True)
        csr.sum_duplicates()
        csr.eliminate_zeros()
        csr.sort_indices()
        return cls(csr.indptr, csr.indices, csr.data, csr.shape[1])

    def to_scipy(self) -> csr_array[Any]:
        """The rows as a `scipy.sparse.csr_array` float32 `[N, width]` with arrays of its own.

        Raises:
            MissingExtraError: SciPy is not installed.
        """
        sparse = require("scipy.sparse", "bench")
        arrays = (self.values.copy(), self.indices.copy(), self.indptr.copy())
        matrix: csr_array[Any] = sparse.csr_array(arrays, shape=self.shape)
        return matrix

    @classmethod
    def from_torch(cls, tensor: Any) -> SparseRows:
        """Rows of a two-dimensional torch tensor: dense, COO or CSR; zeros are left out.

        Raises:
            ShapeError: The tensor is not two-dimensional.
            InputError: A value is negative or not finite.
        """
        return cls(*arrays_of_tensor(tensor), int(tensor.shape[1]))

    # Algebra

    def dot(self, other: SparseRows) -> FloatArray:
        """Inner products of every row with every row of `other`, `[N, M]` float64.

        Products of float32 weights are exact in float64, so this is the score that stores are
        measured against.

        Raises:
            ShapeError: Widths differ.
        """
        if self.width != other.width:
            raise ShapeError(
                f"both sides must have one width, got {self.width} and {other.width}; "
                "rows over different vocabularies have no common score."
            )
        row_of_entry = np.repeat(np.arange(len(self)), self.counts)
        scores = np.zeros((len(self), len(other)), np.float64)
        dense = np.zeros(self.width, np.float64)
        for j in range(len(other)):
            ids, weights = other.row(j)
            dense[ids] = weights
            products = self.values * dense[self.indices]
            scores[:, j] = np.bincount(row_of_entry, weights=products, minlength=len(self))
            dense[ids] = 0.0
        return scores

    def dot_dense(self, matrix: npt.ArrayLike) -> FloatArray:
        """The rows times a dense matrix `[width, D]`: `[N, D]` float64.

        Raises:
            ShapeError: The matrix is not `[width, D]`.
        """
        dense = np.asarray(matrix)
        if dense.ndim != 2 or dense.shape[0] != self.width:
            raise ShapeError(
                f"`matrix` must be [{self.width}, D], got {list(dense.shape)}; "
                "its rows are the token ids of these sparse rows."
            )
        product = np.zeros((len(self), dense.shape[1]), np.float64)
        entries_at_once = max(1, _GATHER_ELEMENTS // max(1, dense.shape[1]))
        start = 0
        while start < len(self):
            limit = self.indptr[start] + entries_at_once
            stop = max(start + 1, int(np.searchsorted(self.indptr, limit, side="right")) - 1)
            part = self[start:stop]
            filled = np.flatnonzero(part.counts)
            if filled.size:
                weighted = part.values[:, None].astype(np.float64) * dense[part.indices]
                product[start + filled] = np.add.reduceat(weighted, part.indptr[filled], axis=0)
            start = stop
        return product

    def topk(self, k: int) -> SparseRows:
        """The `k` largest weights of each row; equal weights keep the smallest token ids.

        Raises:
            ConfigError: `k` is below 1.
        """
        if k < 1:
            raise ConfigError(f"`k` must be at least 1, got {k}; leave it out to keep all entries.")
        counts = self.counts
        if not np.any(counts > k):
            return self
        row_of_entry = np.repeat(np.arange(len(self)), counts)
        order = np.lexsort((self.indices, -self.values, row_of_entry))
        rank = np.arange(self.nnz) - np.repeat(self.indptr[:-1], counts)
        kept = np.sort(order[rank < k])
        return self._trusted(
            row_pointers(np.minimum(counts, k)), self.indices[kept], self.values[kept], self.width
        )

    def top_terms(
        self, n: int, vocabulary: _Names | None = None
    ) -> list[list[tuple[int | str, float]]]:
        """The `n` heaviest dimensions of each row, heaviest first, equal weights by ascending id.

        Each is (token id, weight), or (token text, weight) with a vocabulary; short rows give
        fewer.
        """
        result: list[list[tuple[int | str, float]]] = []
        for i in range(len(self)):
            ids, weights = self.row(i)
            order = np.lexsort((ids, -weights))[:n]
            named = ids[order].tolist()
            if vocabulary is not None:
                named = map(vocabulary.token, named)
            result.append(list(zip(named, weights[order].tolist(), strict=True)))
        return result

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a NumPy `.npz` file; an earlier file is replaced at once, never half."""
        width = np.int64(self.width)
        write_arrays(
            path, indptr=self.indptr, indices=self.indices, values=self.values, width=width
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseRows:
        """Rows written by `save`, checked again.

        Raises:
            FileNotFoundError: There is no such file.
            ConfigError: The file is damaged, cut short, or something else.
        """
        arrays, width = read_arrays(path)
        return cls(*arrays, width)

    def _row_number(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)} rows")
        return i + len(self) if i < 0 else i
