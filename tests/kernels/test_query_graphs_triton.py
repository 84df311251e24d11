"""Captured queries, through the code that captures them: kernels in the interpreter, CUDA stood in.

A graph repeats what was recorded, on the memory it was recorded on, with whatever lies there. So a
value that the host read while recording, or an operation that no capture allows, shows here.
"""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from fake_cuda import FakeCuda
from model_folders import write_bert
from triton_runs import IS_INTERPRETED, quick_interpreter  # noqa: F401 - a fixture

from vdr_db.encoders import text_cuda as encoder_cuda
from vdr_db.encoders import text_torch
from vdr_db.encoders.text import SparseEncoder
from vdr_db.encoders.text_cuda import DeviceQueue, QueryGraphs
from vdr_db.towers import text_body as body

pytestmark = [
    pytest.mark.skipif(
        not IS_INTERPRETED, reason="a device captures graphs itself, in test_encoder_cuda.py"
    ),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning"),
]


def looped_attention(q, k, v, bounds, bounds_k, longest, longest_k):
    out = torch.zeros_like(q)
    for start, stop in itertools.pairwise(bounds.tolist()):
        if start < stop:
            rows = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
            found = torch.nn.functional.scaled_dot_product_attention(*rows)
            out[start:stop] = found[0].transpose(0, 1)
    return out


@pytest.fixture
def cuda(monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    made = FakeCuda()
    made.install(monkeypatch)
    monkeypatch.setattr(GridExecutor, "__call__", made.kernel(GridExecutor.__call__))
    attention = made.opaque(looped_attention)
    monkeypatch.setattr(body, "ragged_attention", lambda *args: attention)
    monkeypatch.setattr(text_torch, "queue_on", DeviceQueue)
    monkeypatch.setattr(encoder_cuda, "GRAPH_TEXTS", (1, 4))
    monkeypatch.setattr(encoder_cuda, "GRAPH_TOKENS", (16, 32))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("models") / "bert")


def load(folder, **options):
    return SparseEncoder.from_pretrained(folder, device="cpu", backend="triton", **options)


QUERIES = [["cat"], ["blue book of the sea"], ["dog", "heavy water", "moon"], ["the sun"]]


@pytest.mark.parametrize("options", [{}, {"head": "vdr", "k": 5, "norm": True}], ids=str)
def test_a_replay_computes_the_queries_of_the_day(folder, cuda, options, monkeypatch):
    options = dict(options)
    norm = options.pop("norm", False)
    encoder = load(folder, **options)
    encoder.norm = norm
    captures = []
    plain = QueryGraphs._capture
    monkeypatch.setattr(
        QueryGraphs, "_capture", lambda *args: captures.append(args[1]) or plain(*args)
    )
    expected = [encoder.encode_queries(texts) for texts in QUERIES]
    encoder.query_graphs = True
    with cuda:
        found = [encoder.encode_queries(texts) for texts in QUERIES]
        cuda.forget_freed()
    assert captures == [(1, 16), (4, 16)]
    for one, other in zip(found, expected, strict=True):
        assert one.nnz
        assert one.allclose(other, atol=1e-5)
    assert cuda.faults == []


def test_threads_take_turns(folder, cuda, monkeypatch):
    """Two threads have two streams; graphs share memory, and outcomes lie in it."""
    encoder = load(folder)
    encoder.query_graphs = True
    others = [cuda.stream(), cuda.stream()]

    def encode():
        with cuda:
            for stream, texts in zip(others * 2, QUERIES, strict=True):
                with cuda.on(stream):
                    encoder.encode_queries(texts)
            cuda.forget_freed()

    encode()
    assert cuda.faults == []
    # without the wait for the replay before, it shows
    monkeypatch.setattr(DeviceQueue, "follow", lambda self, event: None)
    monkeypatch.setattr(
        encoder_cuda.Arrival, "wait", lambda self: [x.numpy() for x in self._pinned]
    )
    encode()
    assert any("replay" in fault for fault in cuda.faults)


def test_a_pool_that_no_graph_uses_is_not_used_again(folder, cuda):
    """torch stops with an internal error where one is."""
    encoder = load(folder)
    encoder.query_graphs = True
    with cuda:
        encoder.encode_queries(["cat"])
        first = encoder._graphs._captured[1, 16].graph.pool
        encoder.encode_queries(["cat", "dog"])
        assert encoder._graphs._captured[4, 16].graph.pool == first
        with torch.no_grad():
            encoder.query_tower.head.bias.add_(0.5)
        encoder.encode_queries(["cat"])
        assert encoder._graphs._captured[1, 16].graph.pool != first
    assert cuda.faults == []
    assert len(encoder._graphs._captured) == 1


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        (lambda rows: int(rows[0, 0] > 0), "item"),
        (lambda rows: rows.nonzero(), "nonzero"),
        (lambda rows: rows + torch.tensor([1.0]), "lift_fresh"),
    ],
    ids=["a value", "a size", "a constant"],
)
def test_the_stand_in_notices_what_no_capture_allows(folder, cuda, monkeypatch, what, fault):
    encoder = load(folder)
    encoder.query_graphs = True
    plain = encoder_cuda.outcome_of
    monkeypatch.setattr(
        encoder_cuda,
        "outcome_of",
        lambda logits, *a, **k: (what(logits), plain(logits, *a, **k))[1],
    )
    with cuda:
        encoder.encode_queries(["cat"])
    assert any(fault in found for found in cuda.faults), cuda.faults
