"""Reading a spool folder back: the rows of finished slices as the source of an ingest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vdr_db.border import foreign
from vdr_db.connectors.base import Documents
from vdr_db.errors import InputError, require
from vdr_db.ingest.ledger import Ranges
from vdr_db.ingest.source import Block, Slice, Window
from vdr_db.ingest.spool import PART_NAME, SPOOL_FORMAT, digest
from vdr_db.readers import Record
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

__all__ = ["SpoolSource"]


class SpoolSource:
    """Rows of a finished spool, as the source of an ingest.

    Args:
        folder: The spool.
        slice: Which parts to take: part i for k = i mod n; this need not be how it was encoded.
        is_partial: Take what is there although slices are missing.
        is_checked: Compare each part with the digest in its manifest before it is read.

    Attributes:
        width: Width of the rows.
        stamp: The encoder, when known.
        documents: What the rows are.

    Raises:
        InputError: Slices are missing, manifests disagree, or a part is not what they say.
        MissingExtraError: pyarrow is not installed.
    """

    has_texts = False
    is_rereadable = True

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        slice: Slice | None = None,
        is_partial: bool = False,
        is_checked: bool = True,
    ) -> None:
        with foreign(f"the spool {folder}", InputError, "encode its slices again"):
            self._open(folder, slice, is_partial=is_partial, is_checked=is_checked)

    def _open(
        self,
        folder: str | os.PathLike[str],
        slice: Slice | None,
        *,
        is_partial: bool,
        is_checked: bool,
    ) -> None:
        self._parquet: Any = require("pyarrow.parquet", "parquet")
        self._folder = Path(folder)
        self._is_checked = is_checked
        manifests = [
            self._read_manifest(path) for path in sorted(self._folder.glob("manifest-*.json"))
        ]
        if not manifests:
            raise InputError(
                f"{self._folder} holds no finished slice of a spool; let `encode` end first."
            )
        first = manifests[0]
        for name in ("width", "stamp", "documents"):
            if any(one[name] != first[name] for one in manifests):
                raise InputError(
                    f"the slices in {self._folder} differ in {name}; "
                    "one spool holds the output of one encoder."
                )
        totals = {one["slice"][1] for one in manifests}
        # Not by walking all slices: the number of them is what a file says.
        is_whole = len({one["slice"][0] for one in manifests}) == max(totals)
        if len(totals) > 1 or not (is_whole or is_partial):
            raise InputError(
                f"{self._folder} is not whole: expected every slice of one number, got slices "
                f"{[f'{k}/{n}' for k, n in (one['slice'] for one in manifests)]}; "
                "finish the missing ones, or load what is there with `is_partial`."
            )
        self.width = int(first["width"])
        self.stamp = None if first["stamp"] is None else EncoderStamp.from_dict(first["stamp"])
        self.documents: Documents = first["documents"]
        chosen = slice or Slice()
        parts = [part for one in manifests for part in one["parts"]]
        self._parts = parts[chosen.k :: chosen.n]
        self.description: Mapping[str, Any] | None = {
            "spool": [{"name": one["name"], "sha256": one["sha256"]} for one in self._parts],
            "slice": str(chosen),
            "place": os.path.abspath(folder),
        }

    def _read_manifest(self, path: Path) -> dict[str, Any]:
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            k, n = manifest["slice"]
            is_ours = manifest["format"] == SPOOL_FORMAT and 0 <= k < n
            for part in manifest["parts"]:
                # The name is used as a path: nothing but a part's own plain name will do.
                is_ours = is_ours and PART_NAME.fullmatch(part["name"]) is not None
                is_ours = is_ours and part["rows"] >= 0 and isinstance(part["sha256"], str)
            manifest["width"], manifest["stamp"], manifest["documents"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a manifest of a spool ({error!r}).") from error
        if not is_ours:
            raise InputError(f"{path} is not a manifest this version can read; encode again.")
        return dict(manifest)

    def blocks(self, settled: Ranges, window: Window) -> Iterator[Block]:
        """The rows that are not settled, in row groups; see `Source`."""
        start = 0
        resumed = 0
        for part in self._parts:
            stop = start + int(part["rows"])
            done = _settled_between(settled, start, stop)
            if done == stop - start:
                resumed += done
            else:
                for block in self._part_blocks(part, start, settled):
                    yield Block(block.numbers, block.records, block.rows, block.resumed + resumed)
                    resumed = 0
            start = stop
        if resumed:
            yield Block([], [], SparseRows.empty(0, self.width), resumed)

    def _part_blocks(self, part: Mapping[str, Any], start: int, settled: Ranges) -> Iterator[Block]:
        path = self._folder / part["name"]
        if self._is_checked and digest(path) != part["sha256"]:
            raise InputError(f"{path} is not what its manifest says; encode its slice again.")
        resumed = 0
        told = foreign(f"the part {path}", InputError, "encode its slice again")
        options = {"memory_map": False, "pre_buffer": False}
        with told, self._parquet.ParquetFile(path, **options) as file:
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                numbers = [n for n in range(start, start + count) if n not in settled]
                resumed += count - len(numbers)
                if numbers:
                    table = file.read_row_group(group)
                    kept = np.array(numbers, np.int64) - start
                    records, rows = self._decoded(table, kept)
                    yield Block(numbers, records, rows, resumed)
                    resumed = 0
                start += count
        if resumed:
            yield Block([], [], SparseRows.empty(0, self.width), resumed)

    def _decoded(self, table: Any, kept: Any) -> tuple[list[Record], SparseRows]:
        table = table.combine_chunks()
        indices, values = (table.column(name).chunk(0) for name in ("indices", "values"))
        offsets = indices.offsets.to_numpy().astype(np.int64)
        span = slice(int(offsets[0]), int(offsets[-1]))
        rows = SparseRows(
            offsets - offsets[0],
            indices.values.to_numpy()[span].astype(np.int32),
            values.values.to_numpy()[span],
            self.width,
        )
        columns = (
            table.column(name).to_pylist() for name in ("id", "id_is_integer", "payload", "source")
        )
        records = [
            Record(int(id) if is_integer else id, "", json.loads(payload), source)
            for id, is_integer, payload, source in zip(*columns, strict=True)
        ]
        if kept.size == len(records):
            return records, rows
        return [records[i] for i in kept], rows[kept]


def _settled_between(settled: Ranges, start: int, stop: int) -> int:
    return sum(max(0, min(b, stop) - max(a, start)) for a, b in settled)
