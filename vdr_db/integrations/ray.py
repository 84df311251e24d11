"""Ray Data: encode a dataset on many actors, write it into a store from many tasks.

`docs/ingest.md` has an example.

Writes are upserts under the id of each row, so a task that Ray runs again, or a whole job, changes
nothing that is there already. Rows of a dataset have no order: of rows that share an id, any may
stay. Needs the extra `ray`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np

from vdr_db.connectors.base import Store
from vdr_db.connectors.encoder import Encoder
from vdr_db.errors import ConfigError, RejectedRows, VdrError, require
from vdr_db.ingest import IngestOptions
from vdr_db.ingest.preparation import encode_readable
from vdr_db.integrations.ray_writer import (
    Columns,
    Outcome,
    StoreWriter,
    UnwrittenRows,
    WritePlan,
)
from vdr_db.sparse import SparseRows

__all__ = ["Columns", "EncodeTexts", "SparseDatasink", "UnwrittenRows"]

ray: Any = require("ray", "ray")
_ray_data: Any = require("ray.data", "ray")
_BlockAccessor: Any = require("ray.data.block", "ray").BlockAccessor
_pyarrow: Any = require("pyarrow", "ray")

_CLOSING_S = 30.0


class EncodeTexts:
    """Adds the vectors of texts to batches; the class to hand to `Dataset.map_batches`.

    Hand over the class and not an object, so that each actor loads the encoder once. The batch may
    come in any format; with `batch_format="pyarrow"` nothing is copied on the way. Result columns
    are those of the batch and `indices` (`list<int32>`, ascending token ids), `values`
    (`list<float32>`) and `encode_error` (`string`). A text that cannot be encoded, such as null,
    keeps its row: its vector is null and its error says why.

    On a small cluster give actors less than a CPU (`num_cpus=0.5`): actors that hold all CPUs leave
    none for the tasks that read, and nothing moves.

    Args:
        model: Name or folder for `SparseEncoder.from_pretrained`, or a function without arguments
            that gives an encoder.
        columns: Names of the columns.
        kind: What to make of a text: the vector of a document or of a query, or the bag of its
            tokens.
        encoder_options: More arguments of `from_pretrained`, such as `device` or `k`.

    Raises:
        ConfigError: `kind` is unknown; later, the batch lacks the text or has a result column.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Callable[[], Encoder],
        *,
        columns: Columns | None = None,
        kind: Literal["document", "query", "tokens"] = "document",
        encoder_options: Mapping[str, Any] | None = None,
    ) -> None:
        if kind not in ("document", "query", "tokens"):
            raise ConfigError(f"`kind` must be 'document', 'query' or 'tokens', got {kind!r}.")
        if callable(model):
            encoder = model()
        else:
            from vdr_db.encoders.text import SparseEncoder

            encoder = SparseEncoder.from_pretrained(os.fspath(model), **(encoder_options or {}))
        self._columns = columns or Columns()
        self._width = int(encoder.vocabulary.size)
        self._encode: Callable[[list[str]], SparseRows] = {
            "document": encoder.encode_documents,
            "query": encoder.encode_queries,
            "tokens": encoder.bag_of_tokens,
        }[kind]

    def __call__(self, batch: Any) -> Any:
        """The batch as a `pyarrow.Table` with three more columns."""
        table, columns = _as_table(batch), self._columns
        made = (columns.indices, columns.values, columns.error)
        taken = [name for name in made if name in table.column_names]
        if columns.text not in table.column_names or taken:
            raise ConfigError(
                f"a batch needs the text column {columns.text!r} and room for {', '.join(made)}, "
                f"got the columns {', '.join(table.column_names)}; name others by `columns`."
            )
        rows, errors = self._rows(table.column(columns.text).to_pylist())
        is_bad = np.array([error is not None for error in errors], bool)
        counts = np.zeros(len(errors), np.int64)
        counts[~is_bad] = rows.counts
        offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        for name, flat in ((columns.indices, rows.indices), (columns.values, rows.values)):
            lists = _pyarrow.ListArray.from_arrays(
                _pyarrow.array(offsets), _pyarrow.array(flat), mask=_pyarrow.array(is_bad)
            )
            table = table.append_column(name, lists)
        return table.append_column(columns.error, _pyarrow.array(errors, _pyarrow.string()))

    def _rows(self, texts: list[Any]) -> tuple[SparseRows, list[str | None]]:
        """Rows of the texts that can be encoded, and for each text why it cannot."""
        errors: list[str | None] = [
            None if isinstance(text, str) else f"the text must be a str, got {type(text).__name__}"
            for text in texts
        ]
        good = [i for i, error in enumerate(errors) if error is None]
        rows, bad = encode_readable(self._encode, [texts[i] for i in good], self._width)
        for place, reason in bad.items():
            errors[good[place]] = reason
        return rows, errors


class SparseDatasink(_ray_data.Datasink):  # type: ignore[misc]
    """Writes vectors into a store; for `Dataset.write_datasink`.

    On a server every write task opens the store for itself. An embedded engine admits one process
    for each folder: then one actor, on the machine that calls `write_datasink`, holds the folder
    and the tasks hand it their blocks. It takes no CPU of the cluster.

    Rows are checked, cut to requests, tried again and, when the store refuses some, isolated just
    as in `vdr_db.ingest`. Refused rows do not stop the job: when all others are stored,
    `write_datasink` raises `RejectedRows` with their ids. So do rows whose `encode_error` is set.

    Args:
        open_store: Opens the store; must be picklable, for example a `functools.partial`.
        encoder: What made the vectors, asked only for its stamp and width. Without one, the
            collection must have been made before, and nothing guards it from other vectors.
        columns: Names of the columns.
        options: Of these count `documents`, `keeps_text`, `has_fingerprint`, `empty`, `writers`
            (threads of a task, 1 without), `batch_documents`, `batch_bytes`, `queue_bytes`, `retry`
            and `max_errors` (of one task; `None` stands for 100 or 1 % of its rows).
        is_local: Whether only one process may open the store.

    Attributes:
        written: Rows the store acknowledged in the last finished write.

    Raises:
        ConfigError: An option is impossible; later, a column is missing or the collection is not.
        RejectedRows: From `write_datasink`, some rows could not be stored; all others are.
        UnwrittenRows: From `write_datasink`, a task gave up; `ids` are its rows that are missing.
    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        encoder: Encoder | None = None,
        *,
        columns: Columns | None = None,
        options: IngestOptions | None = None,
        is_local: bool = False,
    ) -> None:
        options = options or IngestOptions()
        if options.skip is not None:
            raise ConfigError(
                "`skip` saves encoding, and rows that come here are encoded; leave it out."
            )
        self._plan = WritePlan(
            open_store=open_store,
            stamp=None if encoder is None else encoder.stamp(),
            width=None if encoder is None else int(encoder.vocabulary.size),
            columns=columns or Columns(),
            options=options,
            is_local=is_local,
        )
        self._actor: Any = None
        self.written = 0

    @classmethod
    def qdrant(
        cls,
        collection: str,
        encoder: Encoder | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        url: str | None = None,
        api_key: str | None = None,
        store_options: Mapping[str, Any] | None = None,
        columns: Columns | None = None,
        options: IngestOptions | None = None,
    ) -> SparseDatasink:
        """A sink into a collection of Qdrant; `encoder`, `columns`, `options` as in the class.

        It lies in the folder `path` of the embedded engine, on the machine that calls
        `write_datasink`, or on a server that every node can reach under `url` with `api_key`.
        `store_options` are more arguments of `QdrantStore`.

        Raises:
            ConfigError: Not exactly one of `path` and `url` is given, or the store would not
                outlive the write.
        """
        from vdr_db.connectors.qdrant.store import QdrantStore

        if (path is None) == (url is None) or path == ":memory:":
            raise ConfigError(
                "exactly one of `path` (a folder; a store in memory would end with the write) and "
                "`url` is needed."
            )
        # The actor's working directory may be another one.
        place = (
            {"url": url, "api_key": api_key} if path is None else {"path": os.path.abspath(path)}
        )
        open_store = partial(QdrantStore, collection, **place, **_sendable(store_options))
        return cls(open_store, encoder, columns=columns, options=options, is_local=path is not None)

    @classmethod
    def elasticsearch(
        cls,
        index: str,
        encoder: Encoder | None = None,
        *,
        url: str | Sequence[str] | None = None,
        cloud_id: str | None = None,
        api_key: str | tuple[str, str] | None = None,
        basic_auth: tuple[str, str] | None = None,
        store_options: Mapping[str, Any] | None = None,
        columns: Columns | None = None,
        options: IngestOptions | None = None,
    ) -> SparseDatasink:
        """A sink into an alias of Elasticsearch; `encoder`, `columns`, `options` as in the class.

        It lies at the `url` of one node, or of several of one cluster, or in the hosted deployment
        `cloud_id`, reached with an `api_key`, a key or (id, key), or `basic_auth`, (user,
        password). `store_options` are more arguments of `ElasticsearchStore`.
        """
        from vdr_db.connectors.elasticsearch.store import ElasticsearchStore

        open_store = partial(
            ElasticsearchStore,
            index,
            url=url,
            cloud_id=cloud_id,
            api_key=api_key,
            basic_auth=basic_auth,
            **_sendable(store_options),
        )
        return cls(open_store, encoder, columns=columns, options=options)

    def __repr__(self) -> str:
        """What it is, without the place: that may hold secrets."""
        return f"{type(self).__name__}(is_local={self._plan.is_local})"

    def on_write_start(self, schema: Any = None) -> None:
        """Makes the collection, or checks it; called by Ray where the write was called."""
        if not self._plan.is_local:
            with self._opened():
                return
        here = ray.get_runtime_context().get_node_id()
        strategies = require("ray.util.scheduling_strategies", "ray")
        actor = ray.remote(StoreWriter).options(
            num_cpus=0,
            scheduling_strategy=strategies.NodeAffinitySchedulingStrategy(here, soft=False),
        )
        self._actor = actor.remote(self._plan)
        _remote_result(self._actor.open.remote())

    def write(self, blocks: Iterable[Any], ctx: Any) -> Outcome:
        """Writes the blocks of one task; called by Ray."""
        tables = (_BlockAccessor.for_block(block).to_arrow() for block in blocks)
        if self._actor is None:
            with self._opened() as writer:
                return writer.write(tables)
        outcome = Outcome()
        for table in tables:
            try:
                part = _remote_result(self._actor.write_table.remote(table))
            except ray.exceptions.RayActorError as error:
                ids = table.column(self._plan.columns.id).to_pylist()
                reason = "the process that holds the folder of the store ended"
                raise UnwrittenRows(ids, reason) from error
            outcome.written += part.written
            outcome.refused += part.refused
        return outcome

    def on_write_complete(self, write_result: Any) -> None:
        """Makes all durable and reports refused rows; called by Ray.

        Raises:
            RejectedRows: Some rows could not be stored; all others are.
        """
        if self._actor is not None:
            self._end_actor()
        else:
            with self._opened(has_written=True):
                pass
        outcomes = [one for one in write_result.write_returns if isinstance(one, Outcome)]
        self.written = sum(one.written for one in outcomes)
        refused = [refusal for one in outcomes for refusal in one.refused]
        if refused:
            raise RejectedRows([one.id for one in refused], [one.reason for one in refused])

    def on_write_failed(self, error: Exception) -> None:
        """Lets the folder go; called by Ray, which then raises the error.

        Raises:
            VdrError: What happened in the task, without what Ray wrapped around it.
        """
        if self._actor is not None:
            self._end_actor(is_failed=True)
        cause = _own_cause(error)
        if cause is not None and cause is not error:
            raise cause from error

    @contextmanager
    def _opened(self, *, has_written: bool = False) -> Iterator[StoreWriter]:
        writer = StoreWriter(self._plan)
        try:
            writer.open()
            yield writer
        finally:
            writer.close(has_written=has_written)

    def _end_actor(self, *, is_failed: bool = False) -> None:
        actor, self._actor = self._actor, None
        try:
            closing = actor.close.remote(has_written=True)
            _remote_result(closing, timeout_s=_CLOSING_S if is_failed else None)
        except Exception:
            if not is_failed:
                raise
            # The write failed for a reason that matters more; what was acknowledged survives.
        finally:
            ray.kill(actor)


def _remote_result(reference: Any, timeout_s: float | None = None) -> Any:
    """The result of a call of the actor; its errors as if it were no other process."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        cause = _own_cause(error)
        if cause is None:
            raise
        raise cause from None


def _own_cause(error: BaseException) -> VdrError | None:
    """The error of this library within one of Ray's."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        inner = getattr(link, "cause", None)
        if isinstance(link, VdrError) and not isinstance(inner, BaseException):
            return link
        link = inner if isinstance(inner, BaseException) else link.__cause__
    return None


def _as_table(batch: Any) -> Any:
    """A batch of any of Ray's formats as a `pyarrow.Table`."""
    if isinstance(batch, _pyarrow.Table):
        return batch
    return _BlockAccessor.for_block(_BlockAccessor.batch_to_block(batch)).to_arrow()


def _sendable(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Store options, without what cannot travel to another process."""
    if options and "client" in options:
        raise ConfigError(
            "a ready `client` cannot travel to the tasks of a cluster; give its address."
        )
    return dict(options or {})
