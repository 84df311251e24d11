"""The embedded Qdrant: a collection in a folder, in this process (`qdrant-edge-py`)."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vdr_db.connectors.base import BatchLimits, Payload
from vdr_db.connectors.failures import told
from vdr_db.connectors.qdrant.edge_config import edge_config
from vdr_db.connectors.qdrant.edge_folder import CollectionFolder
from vdr_db.connectors.qdrant.edge_sums import SUM_FIELD, RowDamage, Sums
from vdr_db.connectors.qdrant.engine import (
    ID_FIELD,
    VECTOR_NAME,
    Batch,
    Found,
    HybridQuery,
    IndexKind,
    Manifest,
    PointId,
    Stored,
)
from vdr_db.connectors.qdrant.filters import EdgeDialect
from vdr_db.errors import StoreError, StoreUnavailable, require
from vdr_db.forks import close_files_below, leak, renew_after_fork
from vdr_db.sparse import SparseRows

__all__ = ["EdgeEngine"]

# The engine maps its files into memory: on a full disk the process dies of SIGBUS instead of
# getting an error. So a write is refused while less than this would remain free.
_RESERVE_BYTES = 64 << 20
# Log, stored vector, index and payload of one byte of a row or payload.
_DISK_BYTES_PER_BYTE = 4

# Searches cost the same before and after `optimize`; it saves memory and shortens the next opening.
_OPTIMIZE_AFTER_ROWS = 10_000

_QUERIES_AT_ONCE = 256
_ROWS_READ = 256
_UNAVAILABLE_SIGNS = (
    "WouldBlock",
    "No space left",
    "Permission denied",
    "Read-only file system",
    "os error 13",
    "os error 28",
    "os error 30",
)


class EdgeEngine:
    """An `Engine` over one `EdgeShard`, in a folder or, with `":memory:"`, a temporary one.

    Writes are refused while less than `reserve_bytes` would remain free on its disk. It belongs to
    the process that made it: after a fork, every method of the child's copy raises `StoreError`.
    """

    limits = BatchLimits(rows=1024, bytes=16 << 20, row_bytes=64 << 20)

    def __init__(
        self, collection: str, path: str | os.PathLike[str], *, reserve_bytes: int = _RESERVE_BYTES
    ) -> None:
        self._edge: Any = require("qdrant_edge", "qdrant")
        self._dialect = EdgeDialect(self._edge)
        self._in_memory = os.fspath(path) == ":memory:"
        self._collection = collection
        self._where = f"collection {collection!r} in {os.fspath(path)}"
        self._reserve_bytes = reserve_bytes
        self._shard: Any = None
        self._broken: str | None = None
        self._rows_since_optimize = 0
        self._writes, self._flushed_writes = 0, -1
        self._has_copies: bool | None = None
        self._remove: weakref.finalize[..., Any] | None = None
        if self._in_memory:
            path = tempfile.mkdtemp(prefix="vdr_db-")
            self._remove = weakref.finalize(self, _remove_folder, path, os.getpid())
        self._folder = CollectionFolder(Path(path), self._where)
        self._sums = Sums(self._folder.shard)
        self._process = os.getpid()
        renew_after_fork(self)

    @property
    def where(self) -> str:
        """The collection and its folder."""
        return self._where

    def open(self) -> Manifest | None:
        """Opens the folder; `None` when nothing is there yet."""
        self._check_usable()
        if not self._folder.holds_shard():
            return None
        self._folder.take()
        try:
            manifest = Manifest.from_dict(self._folder.read_manifest(), self._where)
            manifest.check_name(self._collection, str(self._folder.path))
            self._load()
        except BaseException:
            self._folder.release()
            raise
        return manifest

    def create(self, manifest: Manifest) -> None:
        """Makes the collection."""
        self._check_usable()
        if self._in_memory:
            self._check_space(0)
            with self._translated("be made"):
                self._shard = self._new_shard(self._folder.shard, manifest)
            return
        self._folder.make()
        self._folder.take()
        try:
            if self._folder.holds_shard():
                raise StoreUnavailable(
                    f"{self._where} was made by another process meanwhile; open it again."
                )
            self._check_space(0)
            with self._translated("be made"):
                self._new_shard(self._folder.unfinished(), manifest).close()
                self._folder.finish(manifest.to_dict())
            self._load()
            self._sums.start()
        except BaseException:
            self._folder.release()
            raise

    def describe(self, manifest: Manifest) -> None:
        """Puts another description in the place of the one that is there."""
        self._check_usable()
        self._folder.write_manifest(manifest.to_dict())

    def upsert(self, batch: Batch) -> None:
        """Writes one batch; see `Engine.upsert`."""
        self._check_space(batch.size)
        edge, bounds = self._edge, batch.rows.indptr.tolist()
        indices, values = batch.rows.indices.astype(np.uint32), batch.rows.values
        vectors: list[dict[str, Any]] = [
            {VECTOR_NAME: edge.SparseVector(indices[a:b], values[a:b])} for a, b in pairwise(bounds)
        ]
        for name, column in batch.dense.items():
            for vector, numbers in zip(vectors, column.tolist(), strict=True):
                vector[name] = numbers
        payloads = [*batch.payloads]
        if not self._in_memory:
            payloads = self._sums.signed(batch.points, batch.rows, payloads)
        points = list(map(edge.Point, batch.points, vectors, payloads))
        if points and not self._in_memory:
            self._sums.expect(self._points(), len(points), batch.points)
        with self._translated("be written", batch.points):
            self._shard.update(edge.UpdateOperation.upsert_points(points))
        self._rows_since_optimize += len(points)
        if points and not self._in_memory:
            ends = {batch.points[i]: payloads[i][SUM_FIELD] for i in (0, -1)}
            self._sums.wrote(ends, self._points())

    def search(self, rows: SparseRows, limit: int, offset: int, filter: Any) -> list[list[Found]]:
        """The best points of each row; see `Engine.search`."""
        return self._query([*map(self._sparse, rows)], filter, limit, offset, with_payload=True)

    def rankings(self, asked: HybridQuery, limit: int) -> list[list[Found]]:
        """The best points by each side; see `Engine.rankings`."""
        queries = [self._edge.Query.Nearest(asked.vector.tolist(), using=asked.using)]
        if asked.row.nnz:
            queries.insert(0, self._sparse(asked.row))
        return self._query(queries, asked.filter, limit, 0, with_payload=[ID_FIELD])

    def _sparse(self, row: SparseRows) -> Any:
        indices, values = row.row(0)
        vector = self._edge.SparseVector(indices.astype(np.uint32), values)
        return self._edge.Query.Nearest(vector, using=VECTOR_NAME)

    def _query(
        self, queries: Sequence[Any], filter: Any, limit: int, offset: int, *, with_payload: Any
    ) -> list[list[Found]]:
        self._check_usable()
        edge = self._edge
        native = self._dialect.native(filter)
        answers: list[Any] = []
        with self._translated("be searched"):
            # No more can be found than there are points, and limits beyond them cost memory.
            most = max(1, self._shard.info().points_count)
            page = {"limit": min(limit, most), "offset": min(offset, most)}
            shared = {**page, "filter": native, "with_payload": with_payload}
            requests = [edge.QueryRequest(query=query, **shared) for query in queries]
            if len(requests) == 1:
                answers = [self._shard.query(requests[0])]
            else:
                for start in range(0, len(requests), _QUERIES_AT_ONCE):
                    part = requests[start : start + _QUERIES_AT_ONCE]
                    answers += self._shard.query_batch(edge.QueryBatchRequest(part))
        return [
            [Found(_plain_id(hit.id), hit.score, hit.payload or {}) for hit in hits]
            for hits in answers
        ]

    def retrieve(
        self, points: Sequence[PointId], with_rows: bool, *, with_payload: bool = True
    ) -> list[Stored]:
        """The points that are there; see `Engine.retrieve`."""
        self._check_usable()
        with self._translated("be read"):
            records = self._shard.retrieve(list(points), with_payload, with_rows)
        return [_stored(record, VECTOR_NAME if with_rows else None) for record in records]

    def scroll(
        self, after: PointId | None, limit: int, fields: Sequence[str] | None, filter: Any = None
    ) -> tuple[list[Stored], PointId | None]:
        """A page of points; see `Engine.scroll`."""
        self._check_usable()
        request = self._edge.ScrollRequest(
            offset=after,
            limit=limit,
            with_payload=True if fields is None else list(fields),
            filter=self._dialect.native(filter),
        )
        with self._translated("be read"):
            records, following = self._shard.scroll(request)
        page = [_stored(record, None) for record in records]
        return page, None if following is None else _plain_id(following)

    def count(self, filter: Any) -> int:
        """Number of points the filter keeps."""
        self._check_usable()
        request = self._edge.CountRequest(filter=self._dialect.native(filter), exact=True)
        with self._translated("be counted"):
            return int(self._shard.count(request))

    def set_payload(self, payload: Payload, points: Sequence[PointId]) -> None:
        """Sets these fields of the payloads of points that are there."""
        self._check_space(0)
        make, totals = self._edge.UpdateOperation.set_payload, {}
        with self._translated("be written", points):
            if self._in_memory:
                self._shard.update(make(list(points), payload))
                return
            self._sums.expect(self._points(), 0, points)
            for one in self.retrieve(points, True):
                new = self._sums.renewed(one, payload)
                if new:
                    totals[one.point] = new[SUM_FIELD]
                self._shard.update(make([one.point], {**payload, **new}))
        self._sums.wrote(totals, self._points())

    def delete(self, points: Sequence[PointId]) -> None:
        """Removes points."""
        self._check_space(0)
        if points and not self._in_memory:
            self._sums.expect(self._points(), -len(points), points)
        with self._translated("be written", points):
            self._shard.update(self._edge.UpdateOperation.delete_points(list(points)))
        if points and not self._in_memory:
            self._sums.wrote(dict.fromkeys(points, None), self._points())

    def index(self, indexes: Mapping[str, IndexKind]) -> None:
        """Makes payload indexes over what is there."""
        self._check_usable()
        with self._translated("be indexed"):
            self._make_indexes(self._shard, indexes)
        if not self._in_memory:
            manifest = Manifest.from_dict(self._folder.read_manifest(), self._where)
            whole = {**manifest.payload_indexes, **indexes}
            self.describe(replace(manifest, payload_indexes=whole))

    def flush(self) -> None:
        """Writes everything through to the disk."""
        self._check_usable()
        # The engine syncs all its files, even where nothing was written since it did last.
        writes = self._writes
        if self._shard is not None and writes != self._flushed_writes:
            with self._translated("be flushed"):
                self._shard.flush()
            self._flushed_writes = writes

    def optimize(self) -> None:
        """Rewrites segments that grew or lost many rows; the disk needs room for a second copy."""
        self._check_usable()
        if self._shard is not None:
            self._check_space(self._folder.used_bytes() // _DISK_BYTES_PER_BYTE)
            with self._translated("be optimised"):
                self._shard.optimize()
            self._rows_since_optimize, self._has_copies = 0, None
            self._writes += 1

    def close(self) -> None:
        """Flushes, optimises after much was written, and lets go of the folder."""
        count = None
        try:
            if self._shard is not None and self._broken is None and not self._in_memory:
                self.flush()
                count = self.count(None)
                if self._rows_since_optimize >= _OPTIMIZE_AFTER_ROWS:
                    # Optional work: without room for it the collection is right all the same.
                    with contextlib.suppress(StoreUnavailable):
                        self.optimize()
        finally:
            shard, self._shard = self._shard, None
            if shard is not None:
                with contextlib.suppress(Exception):
                    shard.close()
                with contextlib.suppress(OSError):  # without them the collection is right as well
                    self._sums.end(count)
            self._folder.release()
            if self._remove is not None:
                self._remove()

    def _new_shard(self, folder: Path, manifest: Manifest) -> Any:
        # Without its log the engine loses what was not flushed; a temporary folder may.
        config = edge_config(self._edge, manifest, with_log=not self._in_memory)
        shard = self._edge.EdgeShard.create(str(folder), config)
        self._make_indexes(shard, manifest.payload_indexes)
        return shard

    def _make_indexes(self, shard: Any, indexes: Mapping[str, IndexKind]) -> None:
        make = self._edge.UpdateOperation.create_field_index
        for path, kind in indexes.items():
            shard.update(make(path, self._dialect.index(kind)))
        shard.flush()

    def _load(self) -> None:
        damage, last = self._folder.damage(), self._sums.begin()
        try:
            with self._translated("be opened"):
                self._shard = self._edge.EdgeShard.load(str(self._folder.shard))
        except StoreUnavailable:
            raise
        except StoreError as error:
            before = f" Before that, {damage}" if damage else ""
            raise StoreError(
                f"{error}{before} Restore the folder from a backup, or build the collection again."
            ) from error
        self._folder.clear_damage()
        with self._translated("be read"):
            why = last.told(self._sum_of, self.count(None) if last.is_counted else 0)
        if last.was_closed:
            self._flushed_writes = self._writes
        if why:
            self._sums.note_lost(self._where, why)
        if lost := self._sums.lost():
            warnings.warn(lost, UserWarning, stacklevel=2)

    def _sum_of(self, point: PointId) -> int | None:
        """The sum a row carries, `None` for one that is not there."""
        found = self._shard.retrieve([point], True, False)
        return found[0].payload.get(SUM_FIELD) if found else None

    def damage(self) -> RowDamage | None:
        """Reads every row and compares its sum; `None` before the collection is made."""
        return None if self._shard is None else self._sums.damage(self._all_rows())

    def _all_rows(self) -> Iterator[Stored]:
        after: PointId | None = None
        while True:
            request = self._edge.ScrollRequest(
                offset=after, limit=_ROWS_READ, with_payload=True, with_vector=True
            )
            with self._translated("be read"):
                records, following = self._shard.scroll(request)
            yield from (_stored(record, VECTOR_NAME) for record in records)
            if following is None:
                return
            after = _plain_id(following)

    def _points(self) -> int | None:
        """How many there are; `None` where copies that a killed optimisation left count as well."""
        told = int(self._shard.info().points_count)
        if self._has_copies is None:
            self._has_copies = told != self.count(None)
        return None if self._has_copies else told

    def after_fork(self) -> None:
        """Leaves the shard alone for good: it would wait for the parent's threads."""
        shard, self._shard = self._shard, None
        leak(shard)
        self._folder.release()
        close_files_below(self._folder.path.absolute())

    def _check_usable(self) -> None:
        if os.getpid() != self._process:
            raise StoreError(
                f"{self._where} was opened in process {self._process}, which this process was "
                "forked from, and belongs to that one; open it again in this process, or use a "
                "server."
            )
        if self._broken is not None:
            raise StoreError(f"{self._where} stopped: {self._broken} Close it and open it again.")

    def _check_space(self, size: int) -> None:
        self._check_usable()
        free = self._folder.free_bytes()
        needed = self._reserve_bytes + _DISK_BYTES_PER_BYTE * size
        if free < needed:
            raise StoreUnavailable(
                f"the disk of {self._where} is nearly full: {free >> 20} MiB are free, and this "
                f"write needs {(needed >> 20) + 1} MiB with the reserve; nothing of this batch is "
                "written: make room and add it again."
            )

    @contextlib.contextmanager
    def _translated(self, action: str, points: Sequence[PointId] = ()) -> Iterator[None]:
        named = f" ({len(points)} points, {points[0]} to {points[-1]})" if points else ""
        try:
            yield
        except StoreError:
            raise
        except BaseException as error:
            # A Rust panic derives from BaseException, so `except Exception` would miss it.
            if type(error).__name__ == "PanicException":
                self._broken = f"the engine panicked when it should {action}{named}."
                self._folder.note_damage(self._broken)
                raise StoreError(
                    f"{self._where} cannot {action}{named}, the engine panicked: {told(error)}; "
                    "close it and open it again."
                ) from error
            if not isinstance(error, Exception):
                raise
            full = isinstance(error, OSError) or any(s in str(error) for s in _UNAVAILABLE_SIGNS)
            kind = StoreUnavailable if full else StoreError
            raise kind(f"{self._where} cannot {action}{named}: {told(error)}.") from error
        finally:
            self._writes += bool(points)


def _remove_folder(path: str, owner: int) -> None:
    # The end of a forked child must not take its parent's folder away.
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def _stored(record: Any, vector: str | None) -> Stored:
    return Stored.of(record, _plain_id(record.id), vector)


def _plain_id(point: Any) -> PointId:
    return point if isinstance(point, int) else str(point)
