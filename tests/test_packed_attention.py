"""Attention without padding: which devices have it, and that it gives the same vectors."""

from __future__ import annotations

import pytest
import torch
from model_folders import write_bert
from without_cuda import load, looped_attention, texts_of

from vdr_db.towers import text_body as body
from vdr_db.towers.packing import Run
from vdr_db.towers.text_body import Ragged, attend

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def looped(monkeypatch):
    monkeypatch.setattr(body, "ragged_attention", lambda *args: looped_attention)


@pytest.mark.usefixtures("looped")
def test_ragged_attention_is_attention_text_by_text():
    runs = [Run(0, 2, 5, 5), Run(10, 1, 3, 3), Run(13, 2, 1, 1)]
    bounds = torch.tensor([0, 5, 10, 13, 13, 14, 15], dtype=torch.int32)  # one text is empty
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(15, 12, generator=generator) for _ in range(3))
    expected = attend(q, k, v, runs, 3)
    found = attend(q, k, v, (), 3, padding=Ragged(bounds, 5))
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("looped")
def test_a_ragged_body_gives_the_same_vectors(folder, monkeypatch):
    encoder = load(folder)
    texts = texts_of(encoder, 12)
    expected = encoder.encode_documents(texts)
    made = []

    def layout(self, runs, cu_seqlens=None, *, device):
        made.append(Ragged(cu_seqlens, max(run.length for run in runs)))
        return made[-1]

    monkeypatch.setattr(body.Body, "layout", layout)
    assert encoder.encode_documents(texts).allclose(expected, atol=1e-5)
    assert made


@pytest.fixture
def hopper(monkeypatch):
    """A device that has the kernel, as far as can be asked."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    body.ragged_attention.cache_clear()
    yield
    body.ragged_attention.cache_clear()


@pytest.mark.usefixtures("hopper")
def test_ragged_attention_needs_a_device_dtype_and_head_it_knows():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    half = torch.bfloat16
    assert body.ragged_attention(CUDA, half, 64) is varlen.varlen_attn
    assert body.ragged_attention(CUDA, torch.float16, 256) is varlen.varlen_attn
    assert body.ragged_attention(CUDA, torch.float32, 64) is None
    assert body.ragged_attention(CUDA, half, 20) is None
    assert body.ragged_attention(CUDA, half, 264) is None
    assert body.ragged_attention(torch.device("cpu"), half, 64) is None


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (torch.cuda, "get_device_capability", lambda device=None: (7, 5)),
        (torch.backends.cuda, "is_flash_attention_available", lambda: False),
    ],
    ids=["an old device", "no kernels"],
)
def test_without_a_kernel_rows_are_padded(monkeypatch, place, name, value):
    monkeypatch.setattr(place, name, value)
    assert body.ragged_attention(CUDA, torch.bfloat16, 64) is None


def test_the_layout_of_a_batch(folder, monkeypatch):
    bert = load(folder).document_tower.body
    bounds = torch.tensor([0, 5, 8], dtype=torch.int32)
    runs = [Run(0, 1, 5, 5), Run(5, 1, 3, 3)]
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert bert.layout(runs, bounds, device=cpu) is None
    assert bert.layout(runs[:1], bounds, device=meta) is None
    assert bert.layout([], bounds, device=meta) is None
    assert isinstance(bert.layout(runs, bounds, device=meta), body.Padding)
    monkeypatch.setattr(body, "ragged_attention", lambda *args: looped_attention)
    assert bert.layout(runs, bounds, device=meta) == Ragged(bounds, 5)
    assert isinstance(bert.layout(runs, device=meta), body.Padding)
    padded = [Run(0, 1, 5, 4), Run(5, 1, 3, 3)]
    assert isinstance(bert.layout(padded, bounds, device=meta), body.Padding)
    bert.train()  # with dropout of attention weights
    try:
        assert isinstance(bert.layout(runs, bounds, device=meta), body.Padding)
    finally:
        bert.eval()
