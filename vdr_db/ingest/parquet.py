"""Records from Parquet files, row group by row group. Needs the extra `parquet`."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterator
from typing import Any

from vdr_db.errors import InputError, require
from vdr_db.readers import Fields, Record

__all__ = ["read_parquet"]

_ROWS_AT_ONCE = 1024


def read_parquet(path: str | os.PathLike[str], *, fields: Fields | None = None) -> Iterator[Record]:
    """Records of one Parquet file, by the same field rules as JSON lines.

    Missing values (null) leave the field out. Dates and times become ISO text, bytes are refused,
    so every payload can be written as JSON.

    Args:
        path: The file.
        fields: Where id, text and payload are; see `vdr_db.readers.Fields`.

    Yields:
        Records in file order; `source` is `"FILE:ROW"` with rows counted from 1.

    Raises:
        InputError: The file is no Parquet file, or a row has no usable id or text.
        MissingExtraError: pyarrow is not installed.
    """
    parquet = require("pyarrow.parquet", "parquet")
    fields = fields or Fields()
    name = os.fspath(path)
    try:
        file = parquet.ParquetFile(name, memory_map=False, pre_buffer=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: not a readable Parquet file ({error}).") from error
    number = 0
    with file:
        try:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    present = {key: value for key, value in row.items() if value is not None}
                    yield _record(present, fields, f"{name}:{number}")
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{name}: damaged after row {number} ({error}).") from error


def _record(row: dict[str, Any], fields: Fields, source: str) -> Record:
    id_field = fields.id or next((name for name in ("_id", "id") if name in row), None)
    id = source if id_field is None else _needed(row, id_field, source)
    if isinstance(id, bool) or not isinstance(id, (int, str)) or id == "":
        raise InputError(
            f"{source}: the field {id_field!r} must be a text or a whole number, got {id!r}."
        )
    names = fields.text or (("title", "text") if "title" in row else ("text",))
    texts = [_needed(row, name, source) for name in names]
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str):
            raise InputError(
                f"{source}: the field {name!r} must be a text, got {type(text).__name__}."
            )
    kept = [name for name in row if name not in (id_field, names[-1])]
    if fields.payload is not None:
        kept = [name for name in fields.payload if name in row]
    payload = {name: _json_like(row[name], name, source) for name in kept}
    return Record(id, " ".join(text for text in texts if text), payload, source)


def _needed(row: dict[str, Any], name: str, source: str) -> Any:
    if name not in row:
        raise InputError(
            f"{source}: the field {name!r} is missing or null; this row has "
            f"{', '.join(map(repr, row)) or 'no field'}."
        )
    return row[name]


def _json_like(value: Any, name: str, source: str) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list):
        return [_json_like(one, name, source) for one in value]
    if isinstance(value, dict):
        return {str(key): _json_like(one, name, source) for key, one in value.items()}
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    raise InputError(
        f"{source}: the field {name!r} holds {type(value).__name__} {str(value)[:20]!r}, which a "
        "payload cannot keep; name the payload fields to leave it out."
    )
