"""The gate in front of every engine: rows, queries and payloads are checked here, not there.

Engines differ in what they do with bad data, and some remember it: the embedded Qdrant panics on a
vector with more indices than values and keeps it in its write-ahead log, so that the collection can
no longer be opened; a payload nested 126 levels deep does the same. So nothing reaches an engine
that is not finite, positive, sorted, unique, in range, JSON, and of moderate size and depth.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vdr_db.connectors.base import BatchLimits, EmptyRows, Id, Payload, check_width
from vdr_db.connectors.ids import checked_ids
from vdr_db.errors import ConfigError, InputError, ShapeError
from vdr_db.sparse import SparseRows

__all__ = [
    "COUNT_FIELD",
    "DOCUMENT_FIELD",
    "FINGERPRINT_FIELD",
    "MAX_PAYLOAD_DEPTH",
    "NUMBER_FIELD",
    "PASSAGE_FIELDS",
    "RESERVED_PREFIX",
    "SMALLEST_WEIGHT",
    "SPAN_FIELD",
    "Prepared",
    "checked_query",
    "clean_payload",
    "prepare",
    "rows_from_pairs",
    "without_tiny",
]

RESERVED_PREFIX = "_vdr_"
"""Payload fields with this prefix belong to the library."""

FINGERPRINT_FIELD = RESERVED_PREFIX + "fp"
"""What the ingest writes beside a document to know it again; `get` gives it back, hits do not."""

DOCUMENT_FIELD, NUMBER_FIELD, COUNT_FIELD, SPAN_FIELD = PASSAGE_FIELDS = tuple(
    RESERVED_PREFIX + name for name in ("doc", "number", "of", "span")
)
"""What a passage tells of itself: its document, as text that sorts like its id; its number from 0,
of how many; and where it stands in the text."""

SMALLEST_WEIGHT = 1e-30
"""Smaller weights are dropped: they change no score, and Elasticsearch refuses the smallest."""

MAX_PAYLOAD_DEPTH = 64
"""Levels of nesting in a payload. The embedded engine cannot replay its log from 126 on."""

_POLICIES = ("store", "skip", "error")
_BYTES_OF_ENTRY = 8
_BYTES_OF_ROW = 64


@dataclass(frozen=True)
class Prepared:
    """Rows that any engine may see.

    Attributes:
        rows: The rows to write.
        ids: Their ids, all different.
        payloads: Their payloads, JSON types only, copied.
        sizes: Estimated bytes of each row with its payload, `[N]` int64.
        empty: How many rows have no entries.
        skipped: Ids of empty rows that are left out on request.
        refused: Id → reason, for rows that cannot be stored.
    """

    rows: SparseRows
    ids: list[Id]
    payloads: list[Payload]
    sizes: npt.NDArray[np.int64]
    empty: int
    skipped: tuple[Id, ...]
    refused: dict[Id, str]

    def batches(self, limits: BatchLimits) -> Iterator[slice]:
        """Consecutive slices within the limits; a row larger than the limit goes alone."""
        start = 0
        running = np.concatenate(([0], np.cumsum(self.sizes)))
        while start < len(self.ids):
            fitting = int(np.searchsorted(running, running[start] + limits.bytes, side="right")) - 1
            stop = max(start + 1, min(fitting, start + limits.rows))
            yield slice(start, stop)
            start = stop


def prepare(
    rows: SparseRows,
    ids: Sequence[Id],
    payloads: Sequence[Mapping[str, Any] | None] | None,
    *,
    width: int,
    empty: EmptyRows,
    limits: BatchLimits,
    where: str,
    check: Callable[[Payload], None] | None = None,
) -> Prepared:
    """Checks one call of `Store.upsert` on the collection `where` of that width.

    `check` raises `InputError` for payloads that the store itself cannot keep.

    Raises:
        TypeError: Something came in another form, for example dictionaries for `SparseRows`.
        ConfigError: The policy for empty rows is unknown.
        ShapeError: The numbers of rows, ids and payloads differ.
        InputError: An id is unusable or repeated, the width is another one, or a payload uses a
            field of the library.
    """
    if not isinstance(rows, SparseRows):
        raise TypeError(
            f"`rows` must be SparseRows, got {type(rows).__name__}; "
            "make them with SparseRows.from_dicts, from_scipy or from_torch"
        )
    if empty not in _POLICIES:
        raise ConfigError(f"`empty` must be one of {_POLICIES}, got {empty!r}.")
    checked = checked_ids(ids, unique=True)
    if isinstance(payloads, Mapping):
        raise TypeError(
            "`payloads` must be a sequence of mappings, got one mapping; pass [payload]"
        )
    given: Sequence[Mapping[str, Any] | None] = [None] * len(rows) if payloads is None else payloads
    if not len(rows) == len(checked) == len(given):
        raise ShapeError(
            "rows, ids and payloads must be equally many, got "
            f"{len(rows)} rows, {len(checked)} ids and {len(given)} payloads."
        )
    check_width(rows, width, where)
    rows = without_tiny(rows)
    counts = rows.counts
    refused: dict[Id, str] = {}
    skipped: list[Id] = []
    kept: list[int] = []
    sizes: list[int] = []
    cleaned: list[Payload] = []
    for i, (id, payload) in enumerate(zip(checked, given, strict=True)):
        refuse_reserved(payload, id)
        if counts[i] == 0 and empty == "skip":
            skipped.append(id)
            continue
        try:
            if counts[i] == 0 and empty == "error":
                raise InputError("the row has no entries")
            clean, size = clean_payload(payload)
            if check is not None:
                check(clean)
            size += _BYTES_OF_ROW + _BYTES_OF_ENTRY * int(counts[i])
            if size > limits.row_bytes:
                raise InputError(
                    f"row and payload take about {size:,} bytes, "
                    f"above the {limits.row_bytes:,} of this store"
                )
        except InputError as error:
            refused[id] = str(error)
            continue
        kept.append(i)
        sizes.append(size)
        cleaned.append(clean)
    written = rows if len(kept) == len(rows) else rows[np.array(kept, np.int64)]
    return Prepared(
        rows=written,
        ids=[checked[i] for i in kept],
        payloads=cleaned,
        sizes=np.array(sizes, np.int64),
        empty=int(np.count_nonzero(written.counts == 0)),
        skipped=tuple(skipped),
        refused=refused,
    )


def checked_query(rows: SparseRows, width: int, where: str, *, single: bool = False) -> SparseRows:
    """Query rows ready for an engine; `single` asks for exactly one."""
    if not isinstance(rows, SparseRows):
        raise TypeError(f"a query must be SparseRows, got {type(rows).__name__}")
    if single and len(rows) != 1:
        raise ShapeError(
            f"`search` takes one row, got {len(rows)}; use `search_batch` for several."
        )
    check_width(rows, width, where)
    return without_tiny(rows)


def without_tiny(rows: SparseRows) -> SparseRows:
    """The rows without weights below `SMALLEST_WEIGHT`, the same object when there are none."""
    large = rows.values >= SMALLEST_WEIGHT
    if large.all():
        return rows
    running = np.concatenate(([0], np.cumsum(large)))
    return SparseRows(running[rows.indptr], rows.indices[large], rows.values[large], rows.width)


def clean_payload(payload: Mapping[str, Any] | None) -> tuple[Payload, int]:
    """A copy of a payload in JSON types, and its size in bytes, estimated.

    Tuples become lists and NumPy scalars Python numbers; anything else that JSON cannot hold is
    an `InputError`, because engines would change it silently.
    """
    if payload is None:
        return {}, 2
    if not isinstance(payload, Mapping):
        raise InputError(f"a payload must be a mapping, got {type(payload).__name__}")
    clean, size = _clean(payload, "", 1)
    return clean, size


def refuse_reserved(payload: Mapping[str, Any] | None, id: Id) -> None:
    """Refuses fields that the library keeps in payloads for itself."""
    if not isinstance(payload, Mapping):
        return
    for name in payload:
        if not (isinstance(name, str) and name.startswith(RESERVED_PREFIX)):
            continue
        is_of_passage = name in PASSAGE_FIELDS and payload.keys() >= set(PASSAGE_FIELDS)
        if name != FINGERPRINT_FIELD and not is_of_passage:
            raise InputError(
                f"payload fields starting with {RESERVED_PREFIX!r} belong to the library, got "
                f"{name!r} for id {id!r}; give the field another name."
            )


def _clean(value: Any, path: str, depth: int) -> tuple[Any, int]:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value, 4
    if isinstance(value, str):
        return _clean_text(value, path)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InputError(
                f"`{path}` is the integer {value}, which 64 bits with a sign cannot hold; store "
                "it as text"
            )
        return int(value), 8
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"`{path}` is {value}, which JSON cannot hold; use None")
        return float(value), 8
    if depth > MAX_PAYLOAD_DEPTH:
        raise InputError(f"the payload is nested deeper than {MAX_PAYLOAD_DEPTH} levels")
    if isinstance(value, Mapping):
        fields: Payload = {}
        size = 2
        for name, inner in value.items():
            if not isinstance(name, str):
                raise InputError(f"field names must be strings, got {name!r} in `{path or '.'}`")
            name, name_size = _clean_text(name, path)
            fields[name], inner_size = _clean(inner, f"{path}.{name}" if path else name, depth + 1)
            size += name_size + inner_size + 2
        return fields, size
    if isinstance(value, (list, tuple)):
        items = [_clean(item, f"{path}[]", depth + 1) for item in value]
        return [item for item, _ in items], 2 + sum(size + 1 for _, size in items)
    hint = next(hint for kinds, hint in _HINTS if isinstance(value, kinds))
    raise InputError(f"`{path}` holds a {type(value).__name__}, which JSON cannot hold; {hint}")


def _clean_text(text: str, path: str) -> tuple[str, int]:
    try:
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise InputError(
            f"`{path}` holds a lone surrogate at character {error.start}, which is not valid "
            "Unicode; clean the text first"
        ) from error
    return str(text), size + 2


_HINTS: tuple[tuple[tuple[type, ...], str], ...] = (
    ((dt.date, dt.time), "store value.isoformat(), which filters understand as a time"),
    ((set, frozenset), "store sorted(value)"),
    ((np.ndarray,), "store value.tolist()"),
    ((bytes, bytearray), "decode it first"),
    ((object,), "store text, numbers, booleans, None, lists or dictionaries"),
)


def rows_from_pairs(
    pairs: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]],
    width: int,
    *,
    duplicates: Literal["error", "sum", "max"] = "error",
) -> SparseRows:
    """Rows from raw (token ids, weights) pairs of unknown quality, such as another tool's output.

    Ids may come in any order. Weights that are 0 or below `SMALLEST_WEIGHT` mean absent.

    Args:
        pairs: One pair of equally long flat arrays for each row.
        width: Vocabulary size.
        duplicates: What to do with an id that occurs twice in a row.

    Raises:
        ConfigError: `duplicates` is unknown.
        ShapeError: Ids and weights of a row differ in number, or are not flat.
        InputError: An id is not an integer in `[0, width)` or repeated, a weight is not a finite
            number or is negative; the message names the row.
    """
    if duplicates not in ("error", "sum", "max"):
        raise ConfigError(f"`duplicates` must be 'error', 'sum' or 'max', got {duplicates!r}.")
    counts = np.zeros(len(pairs) + 1, np.int64)
    all_ids, all_weights = [np.zeros(0, np.int64)], [np.zeros(0, np.float64)]
    for i, (raw_ids, raw_weights) in enumerate(pairs):
        ids, weights = np.asarray(raw_ids), np.asarray(raw_weights, np.float64)
        if ids.ndim != 1 or ids.shape != weights.shape:
            raise ShapeError(
                "ids and weights of a row must be flat and equally many, got shapes "
                f"{list(ids.shape)} and {list(weights.shape)} in row {i}."
            )
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"token ids must be integers, got {ids.dtype} in row {i}.")
        outside = ids[(ids < 0) | (ids >= width)]
        if outside.size:
            raise InputError(f"token ids must lie in [0, {width}), got {outside[0]} in row {i}.")
        bad = weights[~(np.isfinite(weights) & (weights >= 0))]
        if bad.size:
            raise InputError(
                f"weights must be finite and not negative, got {bad[0]} in row {i}; look for NaN "
                "in the model."
            )
        unique, place = np.unique(ids.astype(np.int64), return_inverse=True)
        if unique.size < ids.size and duplicates == "error":
            raise InputError(
                f"every token id may occur once in a row, got {ids.size - unique.size} repeated in "
                f"row {i}; pass duplicates='sum' or 'max' to join them."
            )
        joined = np.zeros(unique.size, np.float64)
        (np.maximum if duplicates == "max" else np.add).at(joined, place, weights)
        kept = joined >= SMALLEST_WEIGHT
        counts[i + 1] = np.count_nonzero(kept)
        all_ids.append(unique[kept])
        all_weights.append(joined[kept])
    return SparseRows(
        np.cumsum(counts), np.concatenate(all_ids), np.concatenate(all_weights), width
    )
