"""Points as the protobuf messages that go over gRPC, built from arrays.

The client's models of a point are lists of Python numbers, which it copies, number by number, into
such messages; that was most of what a write cost. Here the two lists of a sparse vector are laid
out as bytes for a whole batch at once, which protobuf reads back, and the messages go to the
client's own stub, `grpc_points`. That they equal the client's own conversion is compared once,
before the first is sent; where they do not, the models are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from vdr_db.connectors.halving import RefusedBatch
from vdr_db.connectors.qdrant.engine import Batch
from vdr_db.sparse import SparseRows

__all__ = ["PointMessages"]

_PACKED = 2  # protobuf's wire type of anything with a length, such as repeated numbers


class PointMessages:
    """Builds points as messages and sends them; `of` gives one for a client that speaks gRPC."""

    def __init__(
        self, grpc: Any, convert: Any, client: Any = None, timeout: float | None = None
    ) -> None:
        self._client, self._timeout = client, timeout
        self._request, self._point, self._id = grpc.UpsertPoints, grpc.PointStruct, grpc.PointId
        self._payload = convert.convert_payload
        self._has_timeout = "timeout" in self._request.DESCRIPTOR.fields_by_name
        numbers = grpc.SparseVector.DESCRIPTOR.fields_by_name
        self._values, self._indices = numbers["values"].number, numbers["indices"].number
        self._dense = grpc.DenseVector.DESCRIPTOR.fields_by_name["data"].number

    @classmethod
    def of(cls, client: Any) -> PointMessages | None:
        """A builder for a client, synchronous or not; `None` where its models must be used.

        That is so over REST, in the client's local mode, and for clients before 1.16, which sent
        sparse vectors in another form.
        """
        # Not public, but the options of a client do not tell its local mode, nor what a timeout
        # left out means; without the attributes there are still the models.
        remote: Any = getattr(client, "_client", None)
        if getattr(remote, "_prefer_grpc", False) is not True:
            return None
        try:
            from qdrant_client import grpc
            from qdrant_client.conversions.conversion import RestToGrpc

            made = cls(grpc, RestToGrpc, client, remote._timeout)
            return made if made._is_exact() else None
        except (ImportError, AttributeError, KeyError, TypeError, ValueError):
            return None  # another client than those known

    def upsert(
        self, collection: str, batch: Batch, vector: str, timeout: int | None = None
    ) -> None:
        """Writes one batch and waits until it is visible, for at most `timeout` seconds there."""
        points = self.points(batch, vector)
        # Older clients have no such field.
        limit = {"timeout": timeout} if timeout and self._has_timeout else {}
        request = self._request(collection_name=collection, wait=True, points=points, **limit)
        self._client.grpc_points.Upsert(request, timeout=self._timeout)

    def points(self, batch: Batch, vector: str) -> list[Any]:
        """The points of one batch, with the sparse vector under a name.

        Raises:
            RefusedBatch: A payload holds what gRPC cannot carry.
        """
        points = []
        sparse = self._sparse_bytes(batch.rows)
        others = {name: self._dense_bytes(column) for name, column in batch.dense.items()}
        whole = zip(batch.points, batch.payloads, sparse, strict=True)
        for i, (point, payload, content) in enumerate(whole):
            id = self._id(num=point) if isinstance(point, int) else self._id(uuid=point)
            try:
                message = self._point(id=id, payload=self._payload(payload))
            except ValueError as error:
                raise RefusedBatch(f"its payload cannot be sent: {error}") from error
            named = message.vectors.vectors.vectors
            named[vector].sparse.MergeFromString(content)
            for name, columns in others.items():
                named[name].dense.MergeFromString(columns[i])
            points.append(message)
        return points

    def _sparse_bytes(self, rows: SparseRows) -> Iterator[bytes]:
        """A `SparseVector` message of each row, as bytes."""
        values = rows.values.astype("<f4", copy=False).tobytes()
        indices, ends = _varints(rows.indices)
        starts, bounds = ends[rows.indptr].tolist(), rows.indptr.tolist()
        for i in range(len(rows)):
            yield _field(self._values, values[4 * bounds[i] : 4 * bounds[i + 1]]) + _field(
                self._indices, indices[starts[i] : starts[i + 1]]
            )

    def _dense_bytes(self, column: npt.NDArray[np.float32]) -> list[bytes]:
        """A `DenseVector` message of each row, as bytes."""
        return [_field(self._dense, row.astype("<f4", copy=False).tobytes()) for row in column]

    def _is_exact(self) -> bool:
        """Whether a point of every kind of content becomes what the client makes of it."""
        from qdrant_client import models
        from qdrant_client.conversions.conversion import RestToGrpc

        id, payload = "8f5a7f06-62c5-4d3a-9c5e-3a1b0d0c9e55", {"a": [1, None, {"b": 0.5}], "c": "d"}
        indices, values, dense = [0, 127, 128, 70_000], [0.5, 1.0, 1e-30, 3.25], [0.5, -2.0]
        row = SparseRows([0, 4], indices, values, 70_001)
        column = np.array([dense], np.float32)
        batch = Batch([id], [id], row, [payload], {"dense": column}, 0)
        (built,) = self.points(batch, "sparse")
        vectors: dict[str, Any] = {
            "sparse": models.SparseVector(indices=indices, values=values),
            "dense": dense,
        }
        given = models.PointStruct(id=id, vector=vectors, payload=payload)
        return bool(built == RestToGrpc.convert_point_struct(given))


def _varints(numbers: npt.NDArray[np.int32]) -> tuple[bytes, npt.NDArray[np.int64]]:
    """Numbers ≥ 0 as protobuf writes them, and where each begins, with the end, `[N + 1]`.

    Seven bits a byte, the lowest first; all bytes of a number but the last have the eighth bit.
    """
    whole = numbers.astype(np.uint32)
    width = max(1, (int(whole.max(initial=0)).bit_length() + 6) // 7)
    groups = np.empty((whole.size, width), np.uint8)
    is_used = np.ones((whole.size, width), np.bool_)
    lengths = np.ones(whole.size, np.int64)
    for place in range(width):
        rest = whole >> np.uint32(7 * place)
        groups[:, place] = rest & np.uint32(0x7F)
        if place:
            goes_on = rest > 0
            is_used[:, place] = goes_on
            lengths += goes_on
            groups[:, place - 1] |= goes_on.view(np.uint8) << np.uint8(7)
    ends = np.zeros(whole.size + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return np.compress(is_used.ravel(), groups.ravel()).tobytes(), ends


def _field(number: int, content: bytes) -> bytes:
    """A field with its length in front; nothing when it is empty, as protobuf does."""
    if not content:
        return b""
    length = len(content)
    head = bytearray([number << 3 | _PACKED])
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head) + content
