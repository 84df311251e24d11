"""The teachers of `scripts/train_tiny.py` against independent statements of what they are."""

import numpy as np
import pytest
import torch
import training_curves
import training_samples

from vdr_db import SparseEncoder
from vdr_db.training.config import build_config
from vdr_db.training.teachers import Bm25Teacher

TEXTS = ["blue sea sea", "green paper", "blue blue paint on blue paper", "moon"]


@pytest.fixture(scope="module")
def script():
    return training_curves.recipe("train_tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    training_samples.settings(folder)
    return str(folder / "bert")


@pytest.fixture(scope="module")
def teachers(script, folder):
    student = SparseEncoder.from_pretrained(folder, activation="elu1p", k=8)
    model = {"start": folder, "max_length": 12, "query_max_length": 12}
    return script.teachers(build_config({"model": model}), student, lambda: TEXTS)


def vectors(folder, activation, side):
    options = {"max_length": 12, "query_max_length": 12, "k": 256, "query_k": 128}
    encoder = SparseEncoder.from_pretrained(folder, activation=activation, **options)
    return getattr(encoder, f"encode_{side}")(TEXTS).to_scipy().toarray()


def test_damped_queries_with_the_words_own_weights_added(script, folder, teachers):
    own, words = teachers
    expected = 4.0 * vectors(folder, "log1p_relu", "queries")
    expected += 2.0 * words.queries(TEXTS).to_dense().numpy()
    np.testing.assert_allclose(own.queries(TEXTS).to_dense(), expected, rtol=1e-5)


def test_documents_damped_by_their_length(script, folder, teachers):
    own, words = teachers
    sums = vectors(folder, "elu1p", "documents")
    sums += 0.33 * words.documents(TEXTS).to_dense().numpy()
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    expected = sums / (norms / 45.0) ** 0.25
    np.testing.assert_allclose(own.documents(TEXTS).to_dense(), expected, rtol=1e-5)


def test_bm25_takes_a_usual_length_from_outside(script, folder, teachers):
    student = SparseEncoder.from_pretrained(folder, activation="elu1p", k=8)
    plain, given = Bm25Teacher(student, TEXTS, 1.0, 10), teachers[1]
    assert given.mean_length == 120.0
    assert (plain.documents(TEXTS).weights < given.documents(TEXTS).weights).all()
    assert torch.equal(plain.queries(TEXTS).weights, given.queries(TEXTS).weights)
    assert [teacher.weight for teacher in teachers] == [0.7, 4.0]
