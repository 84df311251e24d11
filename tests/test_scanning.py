"""Encoders that scan: the vectors of the fp32 head, bit for bit, and when a scan is chosen."""

import logging
import pickle

import numpy as np
import pytest
import torch
from model_folders import write_bert

from vdr_db import SparseEncoder, SparseRows
from vdr_db.encoders import scanning
from vdr_db.encoders.export import export
from vdr_db.encoders.scanning import HeadChoice, codes_of
from vdr_db.errors import ConfigError
from vdr_db.kernels import ACTIVATIONS, project_pool
from vdr_db.kernels.cpu.pooling import pool_columns
from vdr_db.kernels.cpu.scan import encoded
from vdr_db.kernels.cpu.tiles import columns_are_independent

TEXTS = [
    "the heart of the patient beats again after an injection of glucose",
    "a",
    "",
    "water and light " * 20,
    "who came up with relativity?",
    "Crystalline lens, vitreous humor & retina: 17 cases (1967)",
    "renal amyloidosis as a complication of tuberculosis " * 6,
]
SHORT = ["the cat paints a blue wave", "", "water"]
RUNTIMES = ("onnx", "torch")


def loaded(runtime, backend, folder="vdr-mini", **options):
    return SparseEncoder.from_pretrained(
        folder, runtime=runtime, backend=backend, device="cpu", **options
    )


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_vectors_of_the_shipped_model_keep_their_bits(runtime, activation):
    plain, scanned = (
        loaded(runtime, backend, activation=activation) for backend in ("cpu", "cpu-int8")
    )
    for k, lexical in ((1, True), (32, False), (256, True), (None, False)):
        for encoder in (plain, scanned):
            encoder.document_entry = encoder.document_entry.__class__(512, k, "")
            encoder.lexical = lexical
        assert scanned.encode_documents(TEXTS) == plain.encode_documents(TEXTS)
    assert scanned.encode_queries(TEXTS[4:6]) == plain.encode_queries(TEXTS[4:6])
    choice = scanned._choices["document"]
    assert choice.scanned > 0
    assert plain._choices["document"].scanned == 0


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_scanned_vector_depends_on_its_text_alone(runtime):
    encoder = loaded(runtime, "cpu-int8")
    together = encoder.encode_documents(TEXTS)
    for i, text in enumerate(TEXTS):
        assert encoder.encode_documents([text]) == together[i]
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert encoder.encode_documents([TEXTS[i] for i in order]) == together[order]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_small_heads_in_half_precision_and_of_norm_1(tmp_path, runtime, dtype):
    export(write_bert(tmp_path / "source"), tmp_path / "model", dtype=dtype)
    both = [loaded(runtime, way, tmp_path / "model", k=9) for way in ("cpu", "cpu-int8")]
    for norm in (False, True):
        for encoder in both:
            encoder.norm = norm
        wanted, found = (encoder.encode_documents(SHORT) for encoder in both)
        assert found == wanted
        assert wanted.nnz > 0


def test_weights_that_change_are_scanned_anew(tmp_path):
    folder = write_bert(tmp_path / "source")
    encoder, plain = loaded("torch", "cpu-int8", folder, k=9), loaded("torch", "cpu", folder, k=9)
    before = encoder.encode_documents(SHORT)
    for one in (encoder, plain):
        with torch.no_grad():
            one.document_tower.matrix()[5] += 3
            one.document_tower.bias_rows()[7] += 2
    found = encoder.encode_documents(SHORT)
    assert found == plain.encode_documents(SHORT)
    assert found != before


def test_it_does_not_travel_with_an_encoder(tmp_path):
    encoder = loaded("onnx", "cpu-int8")
    before = len(pickle.dumps(encoder))
    wanted = encoder.encode_documents(TEXTS[:2])
    sent = pickle.dumps(encoder)
    assert len(sent) < before + 500_000  # the matrix has 15 MB, its codes 4
    assert pickle.loads(sent).encode_documents(TEXTS[:2]) == wanted


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_not_finite_weights_are_named_as_ever(tmp_path, runtime):
    from safetensors.torch import load_file, save_file

    folder = write_bert(tmp_path / "source")
    weights = load_file(folder / "model.safetensors")
    weights["cls.predictions.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors")
    export(folder, tmp_path / "model")
    encoder = loaded(runtime, "cpu-int8", tmp_path / "model", k=5)
    with pytest.raises(ConfigError, match="the vector of text 0 must be finite"):
        encoder.encode_documents(["cat"])


@pytest.mark.parametrize("T", [1, 16, 100, 700])
def test_some_columns_have_the_bits_of_all(T):
    generator = torch.Generator().manual_seed(T)
    hidden = torch.randn(T, 48, generator=generator)
    weight = torch.randn(5000, 48, generator=generator)
    bias = torch.randn(5000, generator=generator)
    assert columns_are_independent(48, 5000, torch.float32)
    wanted = project_pool(hidden, torch.tensor([0, T]), weight, bias, backend="cpu").logits[0]
    for count in (1, 255, 256, 900):
        columns = torch.randperm(5000, generator=generator)[:count]
        assert torch.equal(pool_columns(hidden, weight, bias, columns), wanted[columns])


# The choice


def rows_of(*weights):
    return SparseRows.from_dicts([dict(enumerate(weights))], 9)


class Clock:
    """Time that goes on only where somebody works."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(scanning.time, "perf_counter", lambda: self.now)

    def work(self, seconds, rows, done):
        def way():
            self.now += seconds
            done.append(seconds)
            return rows

        return way


def chosen(choice, clock, plain, scan, *, tokens=1000, found=None, **options):
    """Which ways ran for one batch."""
    done = []
    wanted = rows_of(1.0, 2.0)
    given = {
        "weights": 0,
        "is_possible": lambda: True,
        "plain": clock.work(plain, wanted, done),
        "scan": clock.work(scan, wanted if found is None else found, done),
        **options,
    }
    result = choice.rows("auto", options.pop("shape", (40, 256, "elu1p")), tokens=tokens, **given)
    assert result == wanted
    return ["plain" if seconds == plain else "scan" for seconds in done]


def test_a_scan_is_chosen_where_it_is_faster(monkeypatch):
    clock = Clock(monkeypatch)
    choice = HeadChoice()
    for _ in range(2):
        assert chosen(choice, clock, 0.03, 0.01) == ["plain"]
    for _ in range(2):
        assert chosen(choice, clock, 0.03, 0.01) == ["plain", "scan"]
    assert chosen(choice, clock, 0.03, 0.01) == ["scan"]
    assert choice.scanned == 1
    for _ in range(2):  # another version of the weights is measured anew
        assert chosen(choice, clock, 0.03, 0.01, weights=1) == ["plain"]
    assert chosen(choice, clock, 0.03, 0.01, weights=1) == ["plain", "scan"]


def test_it_is_not_where_it_is_slower_or_impossible(monkeypatch):
    clock = Clock(monkeypatch)
    slow, impossible = HeadChoice(), HeadChoice()
    for _ in range(2):
        chosen(slow, clock, 0.06, 0.07)
    assert chosen(slow, clock, 0.06, 0.07) == ["plain", "scan"]
    for _ in range(5):
        assert chosen(slow, clock, 0.06, 0.07) == ["plain"]
        assert chosen(impossible, clock, 0.06, 0.01, is_possible=lambda: False) == ["plain"]


def test_other_vectors_end_all_scans(monkeypatch, caplog):
    clock = Clock(monkeypatch)
    choice = HeadChoice()
    for _ in range(2):
        chosen(choice, clock, 0.06, 0.01)
    with caplog.at_level(logging.WARNING):
        wrong = rows_of(1.0, 2.5)
        assert chosen(choice, clock, 0.06, 0.01, found=wrong) == ["plain", "scan"]
    assert "other vectors than the fp32 head" in caplog.text
    assert chosen(choice, clock, 0.06, 0.01) == ["plain"]


def test_codes_are_made_once_for_each_version():
    class Owner:
        pass

    owner, made = Owner(), []

    def make():
        made.append(encoded(np.eye(4, dtype=np.float32).__getitem__, 4, None, 1))
        return made[-1]

    assert codes_of(owner, 1, make) is codes_of(owner, 1, make) is made[0]
    assert codes_of(owner, 2, make) is made[1]
