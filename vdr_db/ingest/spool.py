"""Encoded documents in Parquet files, between encoding and loading. Needs the extra `parquet`.

Encoding wants accelerators and takes long; loading wants the database and may fail. A spool folder
keeps them apart: n encoders, each with a slice k/n of the input, write parts; any number of loaders
write the parts into a store later, as often as needed. Encoders never talk to each other.

```
part-KKKKK-of-NNNNN-FIRST.parquet   rows; appears whole, by a rename, or not at all
manifest-KKKKK-of-NNNNN.json        appears when slice k is complete; lists its parts and digests
quarantine-KKKKK-of-NNNNN.jsonl     documents that could not be encoded
```

Columns of a part: `id` (text), `id_is_integer`, `indices` (list of uint32), `values` (list of
float32), `payload` (JSON text), `source`. Any Parquet reader can use them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from vdr_db.border import foreign
from vdr_db.connectors.base import Documents
from vdr_db.digest import file_digest
from vdr_db.errors import ConfigError, InputError, StoreUnavailable, require
from vdr_db.ingest.batches import Piece
from vdr_db.ingest.identity import of_format_1, run_difference
from vdr_db.ingest.ledger import Ranges
from vdr_db.ingest.source import Slice
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

__all__ = ["PART_NAME", "SPOOL_FORMAT", "SpoolWriter", "digest"]

SPOOL_FORMAT = 1
_GROUP_ROWS = 1024
PART_NAME = re.compile(r"part-(\d{5,})-of-(\d{5,})-(\d{12,})\.parquet")
_METADATA_KEY = b"vdr_db"


def _stem(slice: Slice) -> str:
    return f"{slice.k:05d}-of-{slice.n:05d}"


class SpoolWriter:
    """Writes one slice of a spool, part by part, and knows what earlier runs finished.

    Args:
        folder: The spool; made when missing.
        slice: Which slice this is.
        description: What is being encoded; parts of something else are refused.
        width: Width of the rows.
        stamp: The encoder, when known.
        documents: What the rows are.
        part_rows: Rows after which a part is finished.
        restart: Delete what the folder holds of this slice.

    Attributes:
        settled: Numbers of the records that finished parts account for.
        rows: Rows in finished parts.

    Raises:
        ConfigError: The folder holds parts of another input, encoder or policy.
        StoreUnavailable: The folder cannot be written; methods raise it too.
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        slice: Slice,
        description: Mapping[str, Any],
        *,
        width: int,
        stamp: EncoderStamp | None,
        documents: Documents = "encoded",
        part_rows: int = 65536,
        restart: bool = False,
    ) -> None:
        self._arrow: Any = require("pyarrow", "parquet")
        self._parquet: Any = require("pyarrow.parquet", "parquet")
        self.folder = Path(folder)
        self.slice = slice
        self._part_rows = part_rows
        # What earlier versions compared: one hash of all.
        told = {
            "input": of_format_1(description["input"]),
            "encoder": {k: v for k, v in description["encoder"].items() if k != "settings"},
            "policy": list(description["policy"].values()),
        }
        self._description = json.loads(json.dumps(description))
        self._facts = {
            "format": SPOOL_FORMAT,
            "run": hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest(),
            "described": self._description,
            "width": width,
            "stamp": None if stamp is None else stamp.to_dict(),
            "documents": documents,
        }
        self.settled = Ranges()
        self.rows = 0
        self._parts: dict[str, int] = {}
        self._writer: Any = None
        self._open_ranges = Ranges()
        self._open_rows = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._adopt(restart)
        except OSError as error:
            raise self._unwritable(error) from error

    def _adopt(self, restart: bool) -> None:
        stem = _stem(self.slice)
        for path in self.folder.glob(f".part-{stem}-*.tmp"):
            path.unlink()
        if restart:
            for path in (*self.folder.glob(f"part-{stem}-*.parquet"), self._manifest):
                path.unlink(missing_ok=True)
        for path in sorted(self.folder.glob(f"part-{stem}-*.parquet")):
            with foreign(f"the part {path}", ConfigError, "move it away"):
                self._adopt_part(path)

    def _adopt_part(self, path: Path) -> None:
        facts = self._read_facts(path)
        difference = None
        if facts.get("run") != self._facts["run"]:
            difference = "another input, encoder or options"
            if "described" in facts:
                difference = run_difference(facts["described"], self._description)
        if difference is not None:
            raise ConfigError(
                f"{path} was made of something else: {difference}; use another folder, or "
                "restart to encode this slice again."
            )
        for start, stop in facts["settled"]:
            self.settled.add(start, stop)
        self._parts[path.name] = facts["rows"]
        self.rows += facts["rows"]

    def _read_facts(self, path: Path) -> dict[str, Any]:
        try:
            metadata = self._parquet.read_metadata(path).metadata or {}
            facts = json.loads(metadata[_METADATA_KEY])
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{path} is not a part of a spool ({error}); move it away."
            ) from error
        return dict(facts)

    @property
    def _manifest(self) -> Path:
        return self.folder / f"manifest-{_stem(self.slice)}.json"

    @property
    def quarantine(self) -> Path:
        """Where documents go that cannot be encoded."""
        return self.folder / f"quarantine-{_stem(self.slice)}.jsonl"

    def write(self, piece: Piece) -> None:
        """Adds rows to the open part."""
        if not len(piece):
            return
        try:
            if self._writer is None:
                self._begin(piece.numbers[0])
            self._writer.write_table(self._table(piece), row_group_size=_GROUP_ROWS)
        except OSError as error:
            raise self._unwritable(error) from error
        self._open_ranges.update(piece.numbers)
        self._open_rows += len(piece)

    def skip(self, numbers: list[int]) -> None:
        """Accounts for records that are not written, with the part that is open or comes next."""
        self._open_ranges.update(sorted(numbers))

    @property
    def is_full(self) -> bool:
        """Whether the open part has its rows."""
        return self._open_rows >= self._part_rows

    def finish_part(self) -> None:
        """Makes the open part durable and visible, if there is one."""
        if self._writer is None:
            return
        facts = {
            **self._facts,
            "rows": self._open_rows,
            "settled": [list(one) for one in self._open_ranges],
        }
        name = self._part_name
        try:
            self._writer.add_key_value_metadata({_METADATA_KEY: json.dumps(facts)})
            self._writer.close()
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            os.replace(self._part_path, self.folder / name)
            _sync_folder(self.folder)
        except OSError as error:
            raise self._unwritable(error) from error
        for start, stop in self._open_ranges:
            self.settled.add(start, stop)
        self._parts[name] = self._open_rows
        self.rows += self._open_rows
        self._writer, self._open_ranges, self._open_rows = None, Ranges(), 0

    def complete(self, *, read: int, refused: int) -> None:
        """Writes the manifest: the slice is whole."""
        self.finish_part()
        try:
            parts = [
                {"name": name, "rows": rows, "bytes": path.stat().st_size, "sha256": digest(path)}
                for name, rows in sorted(self._parts.items())
                if (path := self.folder / name)
            ]
            manifest = {
                **{name: fact for name, fact in self._facts.items() if name != "described"},
                "slice": [self.slice.k, self.slice.n],
                "read": read,
                "refused": refused,
                "parts": parts,
            }
            unfinished = self.folder / f".{self._manifest.name}.tmp"
            with open(unfinished, "w", encoding="utf-8") as stream:
                json.dump(manifest, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(unfinished, self._manifest)
            _sync_folder(self.folder)
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Drops the open part; finished ones stay."""
        if self._writer is not None:
            with suppress(OSError, ValueError):
                self._writer.close()
            with suppress(OSError):
                self._stream.close()
                self._part_path.unlink(missing_ok=True)
            self._writer = None

    def _begin(self, first: int) -> None:
        self._part_name = f"part-{_stem(self.slice)}-{first:012d}.parquet"
        self._part_path = self.folder / f".{self._part_name}.tmp"
        self._stream = open(self._part_path, "wb")  # noqa: SIM115, closed with its part
        self._writer = self._parquet.ParquetWriter(
            self._stream, self._schema(), compression="zstd", write_statistics=False
        )

    def _schema(self) -> Any:
        arrow = self._arrow
        kinds = {
            "id": arrow.string(),
            "id_is_integer": arrow.bool_(),
            "indices": arrow.list_(arrow.uint32()),
            "values": arrow.list_(arrow.float32()),
            "payload": arrow.string(),
            "source": arrow.string(),
        }
        return arrow.schema([arrow.field(n, kind, nullable=False) for n, kind in kinds.items()])

    def _table(self, piece: Piece) -> Any:
        arrow, rows = self._arrow, piece.rows
        assert isinstance(rows, SparseRows)  # `encode_to_spool` takes no passages
        offsets = arrow.array(rows.indptr.astype(np.int32))
        indices = arrow.array(rows.indices.astype(np.uint32))
        columns = [
            arrow.array([str(id) for id in piece.ids], arrow.string()),
            arrow.array([isinstance(id, int) for id in piece.ids], arrow.bool_()),
            arrow.ListArray.from_arrays(offsets, indices),
            arrow.ListArray.from_arrays(offsets, arrow.array(rows.values)),
            arrow.array(
                [json.dumps(one, ensure_ascii=False) for one in piece.payloads], arrow.string()
            ),
            arrow.array(list(piece.sources), arrow.string()),
        ]
        return arrow.Table.from_arrays(columns, schema=self._schema())

    def _unwritable(self, error: OSError) -> StoreUnavailable:
        return StoreUnavailable(
            f"the spool {self.folder} cannot be written ({error.strerror or error}); free space or "
            "mend permissions and run the same again: finished parts are kept."
        )


def digest(path: Path) -> str:
    """SHA-256 (hex) of a file; an `InputError` if it is missing."""
    try:
        return file_digest(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; encode its slice again.") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
