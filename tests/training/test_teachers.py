"""Teachers' rows against independent statements of what they are."""

import collections
import math

import numpy as np
import pytest
import torch
import training_samples

from vdr_db import SparseEncoder
from vdr_db.errors import ConfigError
from vdr_db.training.settings import TeacherConfig
from vdr_db.training.teachers import Bm25Teacher, DenseTeacher, make_teachers

TEXTS = ["blue sea sea", "green paper", "blue blue paint on blue paper", "moon"]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    training_samples.settings(folder)
    return SparseEncoder.from_pretrained(folder / "bert", activation="elu1p", k=8)


def make(student, *settings):
    return make_teachers(settings, student, TEXTS, max_length=12, query_max_length=12)


def test_bm25(student):
    (teacher,) = make(student, TeacherConfig(kind="bm25"))
    tokens = [student.token_ids(text) for text in TEXTS]
    mean = np.mean([len(ids) for ids in tokens])
    frequency = collections.Counter(i for ids in tokens for i in set(ids))
    query = "blue paper paper"
    expected = []
    for ids in tokens:
        total = 0.0
        for i in student.token_ids(query):
            idf = math.log(1 + (4 - frequency[i] + 0.5) / (frequency[i] + 0.5))
            tf = ids.count(i)
            total += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(ids) / mean))
        expected.append(total)
    got = teacher.queries([query]).to_dense() @ teacher.documents(TEXTS).to_dense().T
    np.testing.assert_allclose(got.numpy()[0], expected, rtol=1e-5)


def test_bm25_reads_as_much_of_a_text_as_the_student(student):
    teacher = Bm25Teacher(student.tokenizer, student.vocabulary.size, TEXTS, 1.0, 2, student.device)
    sea, blue = (student.vocabulary.id(token) for token in ("sea", "blue"))
    row = teacher.documents(["blue sea moon"]).to_dense()[0]
    assert (row[sea] > 0, row[blue] > 0, int((row > 0).sum())) == (True, True, 2)
    with pytest.raises(ConfigError, match="got none"):
        Bm25Teacher(student.tokenizer, student.vocabulary.size, [], 1.0, 2, student.device)


def test_an_encoder_with_damped_queries_and_documents(student, tmp_path):
    training_samples.settings(tmp_path)
    folder = str(tmp_path / "bert")
    (teacher,) = make(
        student,
        TeacherConfig(
            kind="encoder",
            path=folder,
            activation="elu1p",
            query_activation="log1p_relu",
            query_scale=3.0,
            k=9,
            query_k=5,
            length_power=0.5,
            length_norm=4.0,
        ),
    )
    options = {"max_length": 12, "query_max_length": 12, "k": 9, "query_k": 5}
    plain = SparseEncoder.from_pretrained(folder, activation="elu1p", **options)
    log = SparseEncoder.from_pretrained(folder, activation="log1p_relu", **options)
    queries = 3 * log.encode_queries(TEXTS).to_scipy().toarray()
    np.testing.assert_allclose(teacher.queries(TEXTS).to_dense(), queries, rtol=1e-5)
    documents = plain.encode_documents(TEXTS).to_scipy().toarray()
    norms = np.linalg.norm(documents, axis=1, keepdims=True)
    expected = documents / np.sqrt(norms / 4.0)
    np.testing.assert_allclose(teacher.documents(TEXTS).to_dense(), expected, rtol=1e-5)


def test_an_encoder_with_the_words_own_weights_added(student, tmp_path):
    training_samples.settings(tmp_path)
    folder = str(tmp_path / "bert")
    plain = {"kind": "encoder", "path": folder, "activation": "elu1p", "query_scale": 3.0, "k": 9}
    added = {"lexical_query": 0.5, "lexical_document": 2.0, "mean_length": 4.0}
    without, with_words, words = make(
        student,
        TeacherConfig(**plain),
        TeacherConfig(**plain, **added, length_power=0.5, length_norm=4.0),
        TeacherConfig(kind="bm25", mean_length=4.0),
    )
    expected = without.queries(TEXTS).to_dense() + 0.5 * words.queries(TEXTS).to_dense()
    torch.testing.assert_close(with_words.queries(TEXTS).to_dense(), expected)
    sums = without.documents(TEXTS).to_dense() + 2 * words.documents(TEXTS).to_dense()
    expected = sums / (sums.norm(dim=1, keepdim=True) / 4).sqrt()
    torch.testing.assert_close(with_words.documents(TEXTS).to_dense(), expected)


def test_bm25_takes_a_usual_length_from_outside(student):
    own, given = make(
        student, TeacherConfig(kind="bm25"), TeacherConfig(kind="bm25", mean_length=40.0)
    )
    assert given.mean_length == 40.0
    assert (own.documents(TEXTS).weights < given.documents(TEXTS).weights).all()


def test_rows_over_the_columns_of_a_student_with_fewer(student, tmp_path):
    training_samples.settings(tmp_path)
    path = str(tmp_path / "bert")
    (teacher,) = make(student, TeacherConfig(kind="encoder", path=path, activation="elu1p", k=40))
    fewer = SparseEncoder.from_pretrained(path, activation="elu1p", vocabulary="from_999")
    rows = teacher.documents(TEXTS)
    moved = teacher.over_columns(rows, fewer)
    np.testing.assert_array_equal(moved.to_dense(), rows.to_dense()[:, 999:])


def test_a_dense_teacher_means_over_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    training_samples.settings(tmp_path)
    path = str(tmp_path / "bert")
    teacher = DenseTeacher(path, 1.0, torch.device("cpu"), 10)
    rows = teacher.documents(TEXTS)
    model = transformers.AutoModel.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    for text, row in zip(TEXTS, rows, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:10]])
        with torch.no_grad():
            mean = model(ids).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="dense teacher"):
        DenseTeacher(str(tmp_path / "absent"), 1.0, torch.device("cpu"), 10)
