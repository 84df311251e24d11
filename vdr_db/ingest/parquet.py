"""Records from Parquet files, row group by row group. Needs the extra `parquet`."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vdr_db.budget import BUDGET, Budget
from vdr_db.errors import InputError, require
from vdr_db.lines import shown
from vdr_db.readers import Fields, Record, record_of

__all__ = ["read_parquet"]

_ROWS_AT_ONCE = 1024


def read_parquet(
    path: str | os.PathLike[str],
    *,
    fields: Fields | None = None,
    lenient: bool = False,
    budget: Budget = BUDGET,
) -> Iterator[Record]:
    """Records of one Parquet file, by the same field rules as JSON lines (`vdr_db.readers.Fields`).

    Missing values (null) leave the field out. Dates and times become ISO text, bytes are refused,
    so every payload can be written as JSON. `source` is `"FILE:ROW"` with rows counted from 1.
    `lenient` is that of `vdr_db.readers.read_records`.

    Raises:
        InputError: The file is no Parquet file, its rows are too large, or one has no usable id or
            text.
        MissingExtraError: pyarrow is not installed.
    """
    parquet = require("pyarrow.parquet", "parquet")
    fields = fields or Fields()
    name = shown(path)
    try:
        file = parquet.ParquetFile(os.fspath(path), memory_map=False, pre_buffer=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: not a readable Parquet file ({error}).") from error
    number = 0
    with file:
        try:
            _check_sizes(file.metadata, name, budget)
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    present = {key: value for key, value in row.items() if value is not None}
                    source = f"{name}:{number}"
                    try:
                        record = record_of(present, fields, source, missing="missing or null")
                        kept = {k: _json_like(v, k, source) for k, v in record.payload.items()}
                        record = replace(record, payload=kept)
                    except InputError as error:
                        if not lenient:
                            raise
                        told = str(error).removeprefix(f"{source}: ")
                        record = Record(source, "", {}, source, told)
                    yield record
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{name}: damaged after row {number} ({error}).") from error


def _check_sizes(metadata: Any, name: str, budget: Budget) -> None:
    """Refuses row groups whose rows are larger than a budget, before one is unpacked."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if group.total_byte_size > budget.record_characters * max(1, group.num_rows):
            raise InputError(
                f"{name}: row group {number} unpacks to {group.total_byte_size:,} bytes for "
                f"{group.num_rows:,} rows, more than {budget.record_characters:,} a row; cut its "
                "texts into several rows."
            )


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
