"""Teachers' rows against independent statements of what they are."""

import collections
import math

import numpy as np
import pytest
import torch
import training_samples

from vdr_db import SparseEncoder
from vdr_db.errors import ConfigError
from vdr_db.training.config import build_config
from vdr_db.training.teachers import Bm25Teacher, DenseTeacher, make_teachers

TEXTS = ["blue sea sea", "green paper", "blue blue paint on blue paper", "moon"]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    training_samples.settings(folder)
    return SparseEncoder.from_pretrained(folder / "bert", activation="elu1p", k=8)


def make(student, *settings):
    lengths = {"max_length": 12, "query_max_length": 12}
    config = build_config({"model": lengths, "teachers": settings})
    return make_teachers(config, student, lambda: TEXTS)


def test_bm25(student):
    (teacher,) = make(student, {"kind": "bm25"})
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
    teacher = Bm25Teacher(student, TEXTS, 1.0, 2)
    sea, blue = (student.vocabulary.id(token) for token in ("sea", "blue"))
    row = teacher.documents(["blue sea moon"]).to_dense()[0]
    assert (row[sea] > 0, row[blue] > 0, int((row > 0).sum())) == (True, True, 2)
    with pytest.raises(ConfigError, match="got none"):
        Bm25Teacher(student, [], 1.0, 2)


def test_rows_over_the_columns_of_a_student_with_fewer(student, tmp_path):
    training_samples.settings(tmp_path)
    path = str(tmp_path / "bert")
    (teacher,) = make(student, {"kind": "encoder", "path": path, "activation": "elu1p"})
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
