"""Encoding on a GPU without making it wait: batches overlap, and only CSR comes back.

    batch i + 1   packed and queued by the host while the device works on batch i
    batch i       pooled and selected on the device; its row bounds follow to pinned memory
    batch i - 1   its columns and weights, trimmed to the bounds, on a stream of copies
    batch i - 2   turned into rows by the host

The host waits for events of batches before the one that runs, never for the device as a whole, so
the queue does not run dry. Nothing here reads a value on the device: sizes come from shapes that
the host knows, and selections are trimmed after their bounds have arrived. Pinned memory is lent by
torch's allocator, which hands a block out again only after the copies that used it.

`QueryGraphs` replays the whole computation of small batches as one CUDA graph, where launching some
hundred kernels takes longer than running them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vdr_db.encoders.batching import PackedBatch
from vdr_db.encoders.rows import assemble_rows
from vdr_db.encoders.selection import SMALLEST_NORM
from vdr_db.kernels import Activation, Backend, Selection, activate, select_topk
from vdr_db.sparse import SparseRows
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.text import Tower
from vdr_db.towers.text_body import Ragged, copied

__all__ = ["Arrival", "DeviceQueue", "Outcome", "QueryGraphs", "encode_batches", "outcome_of"]

SMALL_BYTES = 1 << 20
"""Selections up to this capacity are copied whole with their bounds: one wait instead of two."""

GRAPH_TEXTS = (1, 4, 16)
"""Texts of the batches that are captured; a batch takes the next larger size."""
GRAPH_TOKENS = (32, 64, 128, 256, 512)
"""Tokens of the batches that are captured, special tokens included. With more, the device is busy
for longer than the host takes to launch."""
GRAPH_BYTES = 1 << 28
"""Bound on what all captured batches of an encoder may hold: 256 MB."""


@dataclass(frozen=True)
class Outcome:
    """What a batch leaves on the device.

    Attributes:
        indptr: `[B + 1]` int64.
        columns: `[capacity]` int32, of which `indptr[-1]` count.
        weights: `[capacity]` float32, of which `indptr[-1]` count.
        norms: `[B]` float32 to divide rows by, or None.
    """

    indptr: Tensor
    columns: Tensor
    weights: Tensor
    norms: Tensor | None


class Arrival:
    """Tensors on their way to main memory."""

    def __init__(self, sources: Sequence[Tensor], pinned: Sequence[Tensor], event: Any) -> None:
        """Keeps the sources alive: their memory must not be used again before they are copied."""
        self._sources, self._pinned, self._event = sources, pinned, event

    def wait(self) -> list[npt.NDArray[Any]]:
        """Waits for these copies, and returns the arrays; they live in pinned memory."""
        self._event.synchronize()
        self._sources = ()
        return [tensor.numpy() for tensor in self._pinned]


class DeviceQueue:
    """The current stream of a CUDA device, and one beside it for copies to main memory.

    Attributes:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        """Takes a stream for copies."""
        self.device = device
        self._copies = torch.cuda.Stream(device)

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        """The array on the device, by an asynchronous copy from pinned memory."""
        return copied(torch.tensor(array), self.device)  # a copy: arrays may be read-only

    def mark(self) -> Any:
        """An event behind all that has been queued."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def follow(self, event: Any) -> None:
        """Lets what is queued from now on wait for an event."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def download(self, tensors: Sequence[Tensor], after: Any) -> Arrival:
        """Starts copies to pinned memory, behind an event and beside what is queued later."""
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(after)
            pinned = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
            for target, source in zip(pinned, tensors, strict=True):
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._copies)
        return Arrival(tensors, pinned, event)


@dataclass
class _Flight:
    """A batch between its launch and its rows."""

    batch: PackedBatch
    outcome: Outcome
    done: Any
    first: Arrival  # bounds and norms; of a small selection, all
    is_small: bool
    rest: Arrival | None = None


def encode_batches(
    batches: Iterable[PackedBatch],
    score: Callable[[PackedBatch], Outcome],
    queue: DeviceQueue,
    vocabulary: Vocabulary,
) -> Iterator[tuple[PackedBatch, SparseRows]]:
    """Rows of each batch, in the order of the batches, with up to three of them under way.

    Args:
        batches: Made one by one while the device works.
        score: Queues the computation of a batch; must not wait for the device.
        queue: Of the device.
        vocabulary: Of the columns.

    Yields:
        A batch and its rows.

    Raises:
        ConfigError: A weight is not finite; the message names the text.
    """
    flights: deque[_Flight] = deque()
    for batch in batches:
        flights.append(_launch(batch, score(batch), queue))
        if len(flights) > 1:
            _fetch(flights[-2], queue)
        if len(flights) > 2:
            yield _land(flights.popleft(), vocabulary)
    if flights:
        _fetch(flights[-1], queue)
    while flights:
        yield _land(flights.popleft(), vocabulary)


def _launch(batch: PackedBatch, outcome: Outcome, queue: DeviceQueue) -> _Flight:
    done = queue.mark()
    parts = [outcome.indptr] if outcome.norms is None else [outcome.indptr, outcome.norms]
    if 8 * outcome.columns.shape[0] <= SMALL_BYTES:
        parts += [outcome.columns, outcome.weights]
        return _Flight(batch, outcome, done, queue.download(parts, done), is_small=True)
    return _Flight(batch, outcome, done, queue.download(parts, done), is_small=False)


def _fetch(flight: _Flight, queue: DeviceQueue) -> None:
    """Waits for the bounds of a batch, and starts the copies of what lies between them."""
    if flight.is_small:
        return
    nnz = int(flight.first.wait()[0][-1])
    outcome = flight.outcome
    flight.rest = queue.download([outcome.columns[:nnz], outcome.weights[:nnz]], flight.done)


def _land(flight: _Flight, vocabulary: Vocabulary) -> tuple[PackedBatch, SparseRows]:
    """Waits for the rest of a batch, and makes rows that own their memory."""
    arrays = flight.first.wait()
    if flight.rest is not None:
        arrays += flight.rest.wait()
    texts = flight.batch.texts
    indptr, *norms, columns, weights = arrays
    indptr = indptr[: len(texts) + 1].copy()
    nnz = int(indptr[-1])
    rows = assemble_rows(
        indptr,
        columns[:nnz],
        weights[:nnz].copy(),
        norms[0][: len(texts)] if norms else None,
        vocabulary,
        name=lambda row: f"text {int(texts[row])}",
    )
    return flight.batch, rows


def outcome_of(
    logits: Tensor,
    k: int | None,
    activation: Activation,
    norm: bool,
    backend: Backend,
    lexical: tuple[Tensor, Tensor] | None = None,
) -> Outcome:
    """Queues the selection of `[B, V]` scores, and leaves it untrimmed on the device.

    Args:
        logits: `[B, V]` float32.
        k: Columns kept of each row, or None for all with a weight.
        activation: Turns scores into weights.
        norm: Whether rows are to be divided by their L2 norm.
        backend: Of the kernels.
        lexical: Bounds `[B + 1]` and columns `[n]` that are kept in any case, or None.
    """
    selection: Selection = select_topk(
        logits, k, activation=activation, lexical=lexical, trim=False, backend=backend
    )
    norms = None
    if norm:
        norms = torch.linalg.vector_norm(activate(logits, activation), dim=1)
        norms = norms.clamp_min(SMALLEST_NORM).float()
    return Outcome(*selection, norms)


@dataclass
class _Captured:
    """A captured batch: write the inputs, replay, read the outcome."""

    ids: Tensor
    positions: Tensor
    bounds: Tensor
    graph: Any
    outcome: Outcome


class QueryGraphs:
    """CUDA graphs of small batches through one tower, captured when a size first comes up.

    Batches are filled up to a captured size with empty texts and one text of padding, none of which
    leaves a trace. A graph reads weights where they lay when it was captured, so all are thrown
    away when a weight has moved or was written.
    """

    def __init__(
        self,
        tower: Tower,
        options: tuple[int | None, Activation, bool, Backend],
        padding: tuple[int, int],
    ) -> None:
        """Captures nothing yet.

        Args:
            tower: Body and head.
            options: k, activation, norm and backend, as in `outcome_of`.
            padding: Token id and position number of padding.
        """
        self.tower = tower
        self.options = options
        self.padding = padding
        self._captured: OrderedDict[tuple[int, int], _Captured] = OrderedDict()
        self._weights: object = None
        self._arena: tuple[Any, Any] | None = None  # stream and memory pool of all captures
        self._lock = threading.Lock()
        self._last: Any = None

    def is_for(self, tower: Tower, options: tuple[int | None, Activation, bool, Backend]) -> bool:
        """Whether these are the graphs of a tower with these options."""
        return self.tower is tower and self.options == options

    def size_of(self, batch: PackedBatch, device: torch.device) -> tuple[int, int] | None:
        """Texts and tokens of the graph that a batch fits, or None if it is not to be captured."""
        used = int(batch.cu_seqlens[len(batch.texts)])
        texts = next((size for size in GRAPH_TEXTS if size >= len(batch.texts)), None)
        tokens = next((size for size in GRAPH_TOKENS if size >= used), None)
        is_whole = all(run.kept == run.length for run in batch.runs)
        if texts is None or tokens is None or not is_whole:
            return None
        if not self.tower.body.takes_ragged(device):
            return None
        return (texts, tokens) if self.bytes_of(texts, tokens) <= GRAPH_BYTES else None

    def bytes_of(self, texts: int, tokens: int) -> int:
        """Rough size of what a captured batch holds on the device."""
        config = self.tower.body.config
        V = self.tower.head.vocabulary.columns
        k = V if self.options[0] is None else self.options[0]
        widths = 8 * config.hidden_size + 3 * config.intermediate_size
        return 4 * (texts + 1) * V + 16 * texts * k + 4 * tokens * widths

    def score(self, batch: PackedBatch, size: tuple[int, int], queue: DeviceQueue) -> Outcome:
        """Queues the computation of a batch by replaying a graph; see `TextScoring.outcome`."""
        ids, positions, bounds = filled(batch, size, self.padding)
        with self._lock:
            captured = self._of_size(size, queue)
            if self._last is not None:  # another thread's stream may still read the outcome
                queue.follow(self._last)
            captured.ids.copy_(queue.upload(ids))
            captured.positions.copy_(queue.upload(positions))
            captured.bounds.copy_(queue.upload(bounds))
            captured.graph.replay()
            found = captured.outcome
            outcome = Outcome(
                found.indptr.clone(),
                found.columns.clone(),
                found.weights.clone(),
                None if found.norms is None else found.norms.clone(),
            )
            self._last = queue.mark()
        return outcome

    def _of_size(self, size: tuple[int, int], queue: DeviceQueue) -> _Captured:
        weights = [(p.data_ptr(), p._version) for p in self.tower.parameters()]
        if weights != self._weights:
            self._forget(len(self._captured))
            self._weights = weights
        if size in self._captured:
            self._captured.move_to_end(size)
            return self._captured[size]
        held = sum(self.bytes_of(*other) for other in self._captured)
        while self._captured and held + self.bytes_of(*size) > GRAPH_BYTES:
            held -= self.bytes_of(*next(iter(self._captured)))
            self._forget(1)
        self._captured[size] = self._capture(size, queue)
        return self._captured[size]

    def _forget(self, count: int) -> None:
        """Throws the oldest graphs away, once none of them runs any more."""
        if count and self._last is not None:
            self._last.synchronize()
        for _ in range(count):
            self._captured.popitem(last=False)

    def _capture(self, size: tuple[int, int], queue: DeviceQueue) -> _Captured:
        texts, tokens = size
        if self._arena is None or not self._captured:
            # torch refuses a pool that graphs have used and none uses any more (its issue 189126).
            # Within a pool, only captures on one stream can share memory.
            self._arena = torch.cuda.Stream(queue.device), torch.cuda.graph_pool_handle()
        aside, pool = self._arena
        ids = queue.upload(np.full(tokens, self.padding[0], np.int64))
        positions = queue.upload(np.full(tokens, self.padding[1], np.int64))
        bounds = queue.upload(np.array([0] * (texts + 1) + [tokens], np.int32))
        # Beside the current stream, as capture wants it: compiles kernels and fills caches.
        current = torch.cuda.current_stream(queue.device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(2):
                self.compute(ids, positions, bounds)
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile. On entry torch waits for the current device,
        # which need not be the one that the stream belongs to.
        with (
            torch.cuda.device(queue.device),
            torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"),
        ):
            outcome = self.compute(ids, positions, bounds)
        return _Captured(ids, positions, bounds, graph, outcome)

    def compute(self, ids: Tensor, positions: Tensor, bounds: Tensor) -> Outcome:
        """What a graph computes; the last text is padding and left out."""
        layout = Ragged(bounds, ids.shape[0])
        pooled = self.tower(ids, positions, bounds, (), backend=self.options[3], layout=layout)
        return outcome_of(pooled.logits[:-1], *self.options)


def filled(
    batch: PackedBatch, size: tuple[int, int], padding: tuple[int, int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Token ids, positions and bounds of a batch, filled up to a captured size.

    Args:
        batch: At most as large.
        size: Texts and tokens.
        padding: Token id and position of padding.

    Returns:
        ids `[tokens]`, positions `[tokens]`, and bounds `[texts + 2]`: the batch's texts, empty
        ones, and one of padding to the end.
    """
    texts, tokens = size
    count = len(batch.texts)
    used = int(batch.cu_seqlens[count])
    ids = np.full(tokens, padding[0], np.int64)
    positions = np.full(tokens, padding[1], np.int64)
    ids[:used], positions[:used] = batch.input_ids[:used], batch.position_ids[:used]
    bounds = np.full(texts + 2, used, np.int32)
    bounds[: count + 1] = batch.cu_seqlens[: count + 1]
    bounds[-1] = tokens
    return ids, positions, bounds
