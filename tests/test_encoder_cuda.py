"""Encoding on a GPU: overlapped batches, no wait in between, packed attention, captured queries.

Most of it needs no GPU: a stand-in for the device's queue delivers copies late and checks the order
of events, and tensors without data refuse every operation that would read a value. What only a GPU
can tell is at the end; `make gpu` runs it.
"""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from fake_cuda import Event, FakeCuda, Stream
from model_folders import write_bert
from without_cuda import load, looped_attention, texts_of

from vdr_db.checkpoints.plan import Compatibility
from vdr_db.encoders import text_cuda as encoder_cuda
from vdr_db.encoders import text_torch
from vdr_db.encoders.batching import pack
from vdr_db.encoders.text import SparseEncoder
from vdr_db.encoders.text_cuda import Arrival, DeviceQueue, QueryGraphs, filled
from vdr_db.encoders.text_torch import TextScoring
from vdr_db.errors import ConfigError
from vdr_db.kernels import dispatch, select_topk
from vdr_db.sparse import SparseRows
from vdr_db.towers import text_body as body
from vdr_db.training import vectors
from vdr_db.training.vectors import Side

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("models") / "bert")


# Batches overlap


class LateQueue(DeviceQueue):
    """A queue in main memory whose copies arrive when they are waited for, and not before."""

    def __init__(self):
        self.device = torch.device("cpu")
        self.log = []
        self.marks = itertools.count()

    def mark(self):
        number = next(self.marks)
        self.log.append(("launch", number))
        return number

    def follow(self, event):
        pass

    def download(self, tensors, after):
        pinned = [torch.full_like(x, 77) for x in tensors]

        class Event:
            def synchronize(_):
                self.log.append(("wait", after))
                for target, source in zip(pinned, tensors, strict=True):
                    target.copy_(source)

        self.log.append(("copy", after, sum(x.numel() for x in tensors)))
        return Arrival(tensors, pinned, Event())


@pytest.fixture
def queue(monkeypatch):
    made = LateQueue()
    monkeypatch.setattr(text_torch, "queue_on", lambda device: made)
    return made


def untrimmed(logits, k, **options):
    """A selection that is followed by garbage, as a device leaves it."""
    assert options.pop("trim") is False
    found = select_topk(logits, k, **options)
    room = logits.numel() + 3
    columns = torch.full((room,), 2**30, dtype=torch.int32)
    weights = torch.full((room,), torch.nan)
    columns[: len(found.columns)], weights[: len(found.weights)] = found.columns, found.weights
    return found._replace(columns=columns, weights=weights)


OPTIONS = [
    {},
    {"k": 5},
    {"head": "vdr", "k": 6, "lexical": True},
    {"head": "vdr", "k": None, "norm": True},
    {"compatibility": Compatibility("longest", 3)},
    {"compatibility": "max_length"},
    {"dtype": torch.float64},
]


@pytest.mark.parametrize("small_bytes", [0, encoder_cuda.SMALL_BYTES], ids=["two waits", "one"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_overlapped_batches_give_the_same_rows(folder, monkeypatch, options, small_bytes):
    options = dict(options)
    norm = options.pop("norm", False)
    encoder = load(folder, **options)
    encoder.norm = norm
    texts = texts_of(encoder, 23)
    one_by_one = [encoder.encode_documents(texts, token_budget=b) for b in (40, 10_000)]
    monkeypatch.setattr(text_torch, "queue_on", lambda device: LateQueue())
    monkeypatch.setattr(encoder_cuda, "select_topk", untrimmed)
    monkeypatch.setattr(encoder_cuda, "SMALL_BYTES", small_bytes)
    for budget, expected in zip((40, 10_000), one_by_one, strict=True):
        rows = encoder.encode_documents(texts, token_budget=budget)
        if norm:  # the norm is taken of all rows at once
            assert rows.allclose(expected)
        else:
            assert rows == expected
    if encoder.compatibility:
        return  # which makes something of texts without tokens, too
    assert encoder.encode_queries(["", " "]) == SparseRows.empty(2, encoder.vocabulary.size)


@pytest.mark.parametrize("small_bytes", [0, encoder_cuda.SMALL_BYTES], ids=["two waits", "one"])
def test_the_host_waits_for_earlier_batches_only(folder, monkeypatch, queue, small_bytes):
    encoder = load(folder)
    monkeypatch.setattr(encoder_cuda, "SMALL_BYTES", small_bytes)
    texts = texts_of(encoder, 20)
    encoder.encode_documents(texts, token_budget=40)
    launches = [step[1] for step in queue.log if step[0] == "launch"]
    assert launches == [*range(len(launches))]
    assert len(launches) > 4
    last = launches[-1]
    launched = -1
    for step in queue.log:
        if step[0] == "launch":
            launched = step[1]
        elif step[0] == "wait":
            assert step[1] < launched or launched == last, "the device would run dry"
            assert step[1] >= launched - 2, "batches pile up"


def test_only_written_entries_are_copied(folder, monkeypatch, queue):
    encoder = load(folder, k=5)
    monkeypatch.setattr(encoder_cuda, "select_topk", untrimmed)
    monkeypatch.setattr(encoder_cuda, "SMALL_BYTES", 0)
    rows = encoder.encode_documents(["cat", "the dog and the book"])
    copies = [step[2] for step in queue.log if step[0] == "copy"]
    assert copies == [len(rows) + 1, 2 * rows.nnz]


def test_rows_own_their_memory(folder, queue):
    encoder = load(folder)
    rows = encoder.encode_documents(texts_of(encoder, 6), token_budget=30)
    for array in (rows.indptr, rows.indices, rows.values):
        base = array if array.base is None else array.base
        assert isinstance(base, np.ndarray)
        assert base.base is None


def test_broken_weights_name_the_text(folder, queue):
    encoder = load(folder)
    dog = encoder.token_ids("dog")[0]
    with torch.no_grad():
        encoder.document_tower.body.embeddings.word.weight[dog, 0] = torch.nan
    with pytest.raises(ConfigError, match="the vector of text 1 must be finite"):
        encoder.encode_documents(["", "dog"])


# Streams and events: the real queue, on a stand-in for CUDA that notices races


@pytest.fixture
def cuda(monkeypatch):
    made = FakeCuda()
    made.install(monkeypatch)
    monkeypatch.setattr(text_torch, "queue_on", DeviceQueue)
    monkeypatch.setattr(encoder_cuda, "select_topk", untrimmed)
    return made


@pytest.mark.parametrize("small_bytes", [0, encoder_cuda.SMALL_BYTES], ids=["two waits", "one"])
@pytest.mark.parametrize("options", [{}, {"k": 5, "norm": True}], ids=str)
def test_copies_wait_for_what_they_copy(folder, monkeypatch, cuda, options, small_bytes):
    options = dict(options)
    norm = options.pop("norm", False)
    encoder = load(folder, **options)
    encoder.norm = norm
    texts = texts_of(encoder, 30)
    monkeypatch.setattr(encoder_cuda, "SMALL_BYTES", small_bytes)
    with cuda:
        found = encoder.encode_documents(texts, token_budget=60)
        cuda.forget_freed()
    assert cuda.faults == []
    assert len(cuda.streams) == 2
    assert all(stream.clock for stream in cuda.streams)
    monkeypatch.setattr(text_torch, "queue_on", lambda device: None)
    assert found.allclose(encoder.encode_documents(texts, token_budget=60))


def no_wait_for_results(monkeypatch):
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)


def no_wait_for_copies(monkeypatch):
    monkeypatch.setattr(Event, "synchronize", lambda self: None)


def nothing_kept_alive(monkeypatch):
    init = Arrival.__init__
    monkeypatch.setattr(
        Arrival, "__init__", lambda self, sources, pinned, event: init(self, (), pinned, event)
    )
    land = encoder_cuda._launch
    monkeypatch.setattr(
        encoder_cuda,
        "_launch",
        lambda batch, outcome, queue: dataclasses.replace(
            land(batch, outcome, queue), outcome=None
        ),
    )


@pytest.mark.parametrize(
    ("mistake", "fault"),
    [
        (no_wait_for_results, "on stream 1 reads"),
        (no_wait_for_copies, "the host reads"),
        (nothing_kept_alive, "is free while stream 1 uses it"),
    ],
)
def test_the_stand_in_notices_mistakes(folder, monkeypatch, cuda, mistake, fault):
    mistake(monkeypatch)
    encoder = load(folder)
    texts = texts_of(encoder, 30)
    with cuda:
        encoder.encode_documents(texts, token_budget=60)
        cuda.forget_freed()
    assert any(fault in found for found in cuda.faults), cuda.faults[:3]


# Nothing reads a value on the device


META = torch.device("meta")


@pytest.fixture
def launches(monkeypatch):
    """Makes kernels run on tensors without data, and lists them."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    names = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: names.append(self.__name__))
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda device, dtype: "")
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())  # meta has none
    return names


def shape_of_attention(q, k, v, bounds, bounds_k, longest, longest_k):
    return torch.empty_like(q)


@pytest.mark.parametrize("is_ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize(
    "options",
    [
        {"k": None},
        {"k": 9, "lexical": True, "norm": True},
        {"k": 9, "vocabulary": "ascii_from_999", "head": "vdr"},
    ],
    ids=str,
)
def test_scoring_a_batch_never_waits_for_the_device(
    folder, launches, monkeypatch, is_ragged, options
):
    """On the meta device, which has no values to wait for, and says so when one is asked for."""
    options = dict(options)
    norm = options.pop("norm", False)
    encoder = load(folder, precision="bfloat16", **options)
    texts = [text for text in texts_of(encoder, 9) if text]
    tokens = encoder.tokenizer.encode(texts)
    frame = encoder.frame("document")
    batch = pack(tokens, np.arange(len(texts)), frame)
    assert len(batch.runs) > 1
    lexical = encoder._own_tokens(tokens, batch, frame)
    attention = shape_of_attention if is_ragged else None
    monkeypatch.setattr(body, "ragged_attention", lambda *args: attention)
    queue = LateQueue()
    queue.device = META
    tower = encoder.document_tower.to(META)
    with torch.inference_mode():
        scoring = TextScoring(
            tower, encoder.vocabulary, encoder.document_entry.k, encoder.activation, norm,
            "triton", lambda _: lexical,
        )  # fmt: skip
        outcome = scoring.outcome(batch, queue)
    assert outcome.indptr.shape == (len(texts) + 1,)
    assert outcome.columns.device == META
    assert (outcome.norms is not None) == norm
    assert "pool_packed_kernel" in launches
    assert launches[-1] == "keep_kernel"
    assert ("mark_lexical_kernel" in launches) == (lexical is not None)
    assert not queue.log


WAITS = {
    "item": lambda x: x.sum().item(),
    "int": lambda x: int(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "unique": lambda x: x.unique(),
    "repeat": lambda x: x.repeat_interleave(x.long()),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_the_meta_device_refuses_every_kind_of_wait(wait):
    with pytest.raises((NotImplementedError, RuntimeError)):
        wait(torch.empty(5, device=META))


def test_training_keeps_positions_in_two_bytes(folder, monkeypatch):
    """Also where the rows that fill up a batch are longer than any text may be."""
    monkeypatch.setattr(vectors, "_gives_positions", lambda device: True)  # as on a device
    encoder = load(folder, max_length=4)
    encoder.document_tower.requires_grad_(True)
    side = Side.of(encoder, "document", lexical=False)
    tokens = encoder.tokenizer.encode(["cat", "the dog and the book"])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        side.encode(tokens, np.arange(2), {"dense", "gated"})
        side.encode(tokens, np.arange(2), {"gated"})
    widths = [x for x in saved if x.dim() == 2 and x.shape[1] == encoder.vocabulary.columns]
    assert {x.dtype for x in widths if not x.is_floating_point()} == {torch.int16}


@pytest.mark.parametrize("unit_sample", [0, 12])
def test_training_finds_the_same_tokens_with_positions_and_without(
    folder, monkeypatch, unit_sample
):
    encoder = load(folder)
    encoder.document_tower.requires_grad_(True)
    side = Side.of(encoder, "document", lexical=True)
    texts = texts_of(encoder, 9)
    tokens, chosen = encoder.tokenizer.encode(texts), np.array([3, 0, 8, 1, 2, 7, 5, 6, 4])
    kept, gradients = [], []
    for given in (True, False):
        monkeypatch.setattr(vectors, "_gives_positions", lambda device, given=given: given)
        torch.manual_seed(2)
        kept.append(side.encode(tokens, chosen, {"gated"}, unit_sample=unit_sample).gated)
        encoder.document_tower.zero_grad()
        # not of their lengths, which scaling makes the same
        factors = torch.linspace(-1, 1, len(kept[-1].weights))
        (kept[-1].weights * factors).sum().backward()
        gradients.append([p.grad for p in encoder.document_tower.parameters()])
    assert torch.equal(kept[0].columns, kept[1].columns)
    assert torch.equal(kept[0].indptr, kept[1].indptr)
    torch.testing.assert_close(kept[0].weights, kept[1].weights)
    scale = max(float(gradient.abs().max()) for gradient in gradients[1])
    assert scale > 1e-2
    # Some gradients are sums of large terms that cancel out, as that of the keys' bias.
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=2e-6 * scale)


# Captured queries


class Recomputed:
    """Stands for a CUDA graph: computes again from the inputs it was captured with."""

    def __init__(self, graphs, inputs):
        self.graphs, self.inputs, self.replays = graphs, inputs, 0
        self.captured = None

    def replay(self):
        self.replays += 1
        self.captured.outcome = self.graphs.compute(*self.inputs)


@pytest.fixture
def looped(monkeypatch):
    monkeypatch.setattr(body, "ragged_attention", lambda *args: looped_attention)


@pytest.fixture
def captures(monkeypatch, looped):
    """Captures without CUDA; lists the captured sizes."""
    sizes = []

    def capture(self, size, queue):
        sizes.append(size)
        ids = torch.zeros(size[1], dtype=torch.int64)
        inputs = (ids, ids.clone(), torch.zeros(size[0] + 2, dtype=torch.int32))
        graph = Recomputed(self, inputs)
        graph.captured = encoder_cuda._Captured(*inputs, graph, None)
        return graph.captured

    monkeypatch.setattr(QueryGraphs, "_capture", capture)
    return sizes


@pytest.mark.parametrize("options", [{}, {"k": 5}, {"head": "vdr", "k": 7, "norm": True}], ids=str)
def test_captured_queries_give_the_same_rows(folder, captures, queue, options):
    options = dict(options)
    norm = options.pop("norm", False)
    encoder = load(folder, **options)
    encoder.norm = norm
    for count in (1, 2, 4, 5, 16, 17):
        texts = [f"{text} cat" for text in texts_of(encoder, count, seed=count, longest=8)]
        encoder.query_graphs = False
        expected = encoder.encode_queries(texts)
        encoder.query_graphs = True
        for _ in range(2):
            assert encoder.encode_queries(texts).allclose(expected, atol=1e-5)
    assert {texts for texts, _ in captures} == {1, 4, 16}
    assert len(captures) == len(set(captures))
    before = len(captures)
    encoder.encode_documents(["cat"])
    assert len(captures) == before


def test_queries_that_a_graph_cannot_serve_go_the_usual_way(folder, captures, queue, monkeypatch):
    encoder = load(folder, head="vdr", k=5, lexical=True)
    encoder.query_graphs = True
    encoder.encode_queries(["cat"])
    assert not captures
    encoder.lexical = False
    encoder.encode_queries(["cat " * 30] * 16)  # 16 times 32 tokens: the largest size
    assert captures == [(16, 512)]
    encoder.encode_queries(["cat " * 35] * 16)
    encoder.encode_queries(["cat"] * 17)
    assert captures == [(16, 512)]
    monkeypatch.setattr(encoder_cuda, "GRAPH_BYTES", 1000)
    encoder.encode_queries(["dog"])
    monkeypatch.setattr(body, "ragged_attention", lambda *args: None)
    encoder.encode_queries(["dog"])
    assert captures == [(16, 512)]


def test_graphs_are_thrown_away_with_their_weights_and_by_size(
    folder, captures, queue, monkeypatch
):
    encoder = load(folder)
    encoder.query_graphs = True
    graphs = lambda: list(encoder._graphs._captured)  # noqa: E731
    monkeypatch.setattr(queue, "mark", lambda: type("E", (), {"synchronize": lambda self: None})())
    monkeypatch.setattr(queue, "download", lambda tensors, after: now(tensors))

    def now(tensors):
        done = type("E", (), {"synchronize": lambda self: None})()
        return Arrival(tensors, [x.clone() for x in tensors], done)

    first = encoder.encode_queries(["cat"])
    assert graphs() == [(1, 32)]
    with torch.no_grad():
        encoder.query_tower.head.bias.add_(0.5)
    assert encoder.encode_queries(["cat"]) != first
    assert captures == [(1, 32), (1, 32)]
    room = encoder._graphs.bytes_of(1, 32) + encoder._graphs.bytes_of(4, 32)
    monkeypatch.setattr(encoder_cuda, "GRAPH_BYTES", room)
    encoder.encode_queries(["cat", "dog"])
    assert graphs() == [(1, 32), (4, 32)]
    encoder.encode_queries(["cat"])
    encoder.encode_queries(["cat " * 35])
    assert graphs() == [(1, 32), (1, 64)]


def test_a_batch_is_filled_up_with_nothing(folder):
    encoder = load(folder)
    tokens = encoder.tokenizer.encode(["cat", "dog book"])
    batch = pack(tokens, np.arange(2), encoder.frame("query"))
    ids, positions, bounds = filled(batch, (4, 32), (9, 3))
    used = int(batch.cu_seqlens[2])
    assert bounds.tolist() == [0, *batch.cu_seqlens[1:3], used, used, 32]
    assert bounds.dtype == np.int32
    assert ids[:used].tolist() == batch.input_ids[:used].tolist()
    assert set(ids[used:]) == {9}
    assert set(positions[used:]) == {3}


# On a GPU

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device; `make gpu` runs this on one"
    ),
]


@pytest.fixture
def no_waiting_on_device():
    """Makes torch raise on every call that waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


def assert_close_rows(found, expected, atol):
    np.testing.assert_allclose(found.to_scipy().toarray(), expected.to_scipy().toarray(), atol=atol)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"head": "vdr", "k": None, "norm": True}], ids=str)
class TestOnDevice:
    pytestmark = gpu

    def load(self, folder, dtype, options, device="cuda"):
        options = dict(options)
        norm = options.pop("norm", False)
        kind = {"dtype": dtype} if dtype == torch.float16 else {"precision": name_of(dtype)}
        encoder = SparseEncoder.from_pretrained(folder, device=device, **kind, **options)
        encoder.norm = norm
        return encoder

    def test_vectors_are_those_of_the_cpu(self, folder, dtype, options):
        encoder = self.load(folder, dtype, options)
        texts = texts_of(encoder, 200)
        exact = self.load(folder, torch.float32, options, "cpu").encode_documents(texts)
        atol = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
        assert_close_rows(encoder.encode_documents(texts, token_budget=500), exact, atol)

    def test_overlapping_changes_nothing(self, folder, dtype, options, monkeypatch):
        encoder = self.load(folder, dtype, options)
        texts = texts_of(encoder, 300)
        overlapped = encoder.encode_documents(texts, token_budget=400)
        assert overlapped == encoder.encode_documents(texts, token_budget=400)
        monkeypatch.setattr(text_torch, "queue_on", lambda device: None)
        assert overlapped.allclose(encoder.encode_documents(texts, token_budget=400))

    def test_scoring_never_waits(self, folder, dtype, options, no_waiting_on_device):
        encoder = self.load(folder, dtype, options)
        texts = [text for text in texts_of(encoder, 60) if text]
        encoder.encode_documents(texts)  # compiles kernels
        batch = pack(
            encoder.tokenizer.encode(texts), np.arange(len(texts)), encoder.frame("document")
        )
        no_waiting_on_device()
        with torch.inference_mode():
            scoring = TextScoring(
                encoder.document_tower, encoder.vocabulary, encoder.document_entry.k,
                encoder.activation, encoder.norm, "auto", lambda _: None,
            )  # fmt: skip
            scoring.outcome(batch, DeviceQueue(encoder.device))

    def test_captured_queries(self, folder, dtype, options):
        encoder = self.load(folder, dtype, options)
        atol = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
        for count in (1, 3, 16):
            texts = [f"{text} cat" for text in texts_of(encoder, count, seed=count, longest=8)]
            encoder.query_graphs = False
            expected = encoder.encode_queries(texts)
            encoder.query_graphs = True
            first = encoder.encode_queries(texts)
            assert_close_rows(first, expected, atol)
            assert encoder.encode_queries(texts) == first
        if dtype == torch.float32 or encoder._graphs is None:
            return  # no attention on packed rows, so nothing was captured
        assert len(encoder._graphs._captured) >= 1
