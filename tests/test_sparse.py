"""`SparseRows`: invariants, access, algebra and files, against dictionaries and dense NumPy."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from vdr_db import SparseRows
from vdr_db.errors import ConfigError, InputError, ShapeError

WIDTH = 12
WEIGHTS = st.floats(2**-10, 2**10, width=32)
ROW = st.dictionaries(st.integers(0, WIDTH - 1), WEIGHTS, max_size=WIDTH)
ROWS = st.lists(ROW, max_size=7)


def dense(rows: SparseRows) -> np.ndarray:
    matrix = np.zeros(rows.shape)
    for i, row in enumerate(rows.to_dicts()):
        for id, weight in row.items():
            matrix[i, id] = weight
    return matrix


@given(ROWS)
def test_dictionaries_come_back(dicts):
    rows = SparseRows.from_dicts(dicts, WIDTH)
    assert rows.to_dicts() == [dict(sorted(row.items())) for row in dicts]
    assert rows.shape == (len(dicts), WIDTH)
    assert rows.nnz == sum(map(len, dicts)) == rows.counts.sum()
    assert (rows.indptr.dtype, rows.indices.dtype, rows.values.dtype) == (
        np.int64,
        np.int32,
        np.float32,
    )


@given(ROWS, st.data())
def test_selection_is_that_of_a_list(dicts, data):
    rows = SparseRows.from_dicts(dicts, WIDTH)
    listed = rows.to_dicts()
    chosen = data.draw(st.slices(len(dicts)))
    assert rows[chosen].to_dicts() == listed[chosen]
    if dicts:
        numbers = data.draw(st.lists(st.integers(-len(dicts), len(dicts) - 1), max_size=9))
        assert rows[numbers].to_dicts() == [listed[i] for i in numbers]
        mask = data.draw(st.lists(st.booleans(), min_size=len(dicts), max_size=len(dicts)))
        kept = [row for row, is_kept in zip(listed, mask, strict=True) if is_kept]
        assert rows[np.array(mask)].to_dicts() == kept
        assert [len(row) for row in rows] == [1] * len(dicts)
        assert SparseRows.concat(list(rows)) == rows


@pytest.mark.parametrize("step", [2**63, 2**70, -(2**63), -(2**70)])
def test_steps_beyond_64_bits_are_steps(step):
    for dicts in ([], [{1: 1.0}], [{1: 1.0}, {}, {2: 2.0}]):
        rows = SparseRows.from_dicts(dicts, WIDTH)
        assert rows[::step].to_dicts() == dicts[::step]


@given(ROWS, ROWS)
def test_concat_joins_lists(first, second):
    parts = [SparseRows.from_dicts(part, WIDTH) for part in (first, second, [])]
    assert SparseRows.concat(parts) == SparseRows.from_dicts(first + second, WIDTH)


@given(ROWS, ROWS)
def test_dot_is_the_dense_product(left, right):
    rows, others = SparseRows.from_dicts(left, WIDTH), SparseRows.from_dicts(right, WIDTH)
    expected = dense(rows) @ dense(others).T
    np.testing.assert_allclose(rows.dot(others), expected, rtol=1e-12)
    np.testing.assert_allclose(rows.dot_dense(dense(others).T), expected, rtol=1e-12)


def test_dot_dense_cuts_long_inputs_into_parts(monkeypatch):
    monkeypatch.setattr("vdr_db.sparse._GATHER_ELEMENTS", 6)
    dicts = [{}, {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, {}, {5: 1.5}, {1: 1.0}, {}]
    rows = SparseRows.from_dicts(dicts, WIDTH)
    matrix = np.arange(WIDTH * 2, dtype=float).reshape(WIDTH, 2)
    np.testing.assert_allclose(rows.dot_dense(matrix), dense(rows) @ matrix)


@given(ROWS)
def test_scipy_and_torch_round_trips(dicts):
    torch = pytest.importorskip("torch")
    rows = SparseRows.from_dicts(dicts, WIDTH)
    assert SparseRows.from_scipy(rows.to_scipy()) == rows
    assert SparseRows.from_scipy(rows.to_scipy().tocoo()) == rows
    matrix = torch.tensor(dense(rows), dtype=torch.float32).reshape(len(dicts), WIDTH)
    assert SparseRows.from_torch(matrix) == rows
    assert SparseRows.from_torch(matrix.to_sparse_coo()) == rows


def test_torch_csr_and_repeated_entries():
    torch = pytest.importorskip("torch")
    dicts = [{}, {3: 1.5, 1: 2.0}, {}]
    rows = SparseRows.from_dicts(dicts, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR layout a beta
        compressed = torch.tensor(dense(rows)).to_sparse_csr()
    assert SparseRows.from_torch(compressed) == rows
    repeated = torch.sparse_coo_tensor(
        [[1, 1, 1], [3, 1, 3]], [0.5, 2.0, 1.0], (3, 5), check_invariants=True
    )
    assert SparseRows.from_torch(repeated) == rows
    matrix = scipy.sparse.coo_array(([0.5, 2.0, 1.0, 0.0], ([1, 1, 1, 2], [3, 1, 3, 0])), (3, 5))
    assert SparseRows.from_scipy(matrix) == rows


@given(ROWS, st.integers(1, WIDTH))
def test_topk_keeps_the_largest_and_breaks_ties_by_id(dicts, k):
    rounded = [{id: float(round(w)) + 1 for id, w in row.items()} for row in dicts]  # makes ties
    expected = [
        dict(sorted(sorted(row.items(), key=lambda item: (-item[1], item[0]))[:k]))
        for row in rounded
    ]
    assert SparseRows.from_dicts(rounded, WIDTH).topk(k).to_dicts() == expected


def test_top_terms_by_weight_then_id():
    rows = SparseRows.from_dicts([{4: 1.0, 2: 3.0, 1: 1.0}, {}], 5)
    assert rows.top_terms(2) == [[(2, 3.0), (1, 1.0)], []]

    class Letters:
        def token(self, token_id: int) -> str:
            return "abcde"[token_id]

    assert rows.top_terms(9, Letters())[0] == [("c", 3.0), ("b", 1.0), ("e", 1.0)]


@settings(max_examples=20)
@given(ROWS)
def test_files_and_pickles_bring_the_same_rows(tmp_path_factory, dicts):
    rows = SparseRows.from_dicts(dicts, WIDTH)
    path = tmp_path_factory.mktemp("rows") / "rows.npz"
    rows.save(path)
    assert SparseRows.load(path) == rows
    assert [entry.name for entry in path.parent.iterdir()] == ["rows.npz"]
    assert pickle.loads(pickle.dumps(rows)) == rows


def test_damaged_and_foreign_files_are_named(tmp_path):
    rows = SparseRows.from_dicts([{1: 1.0}], WIDTH)
    path = tmp_path / "rows.npz"
    rows.save(path)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ConfigError, match=r"rows\.npz"):
        SparseRows.load(path)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ConfigError, match="not a file of sparse rows"):
        SparseRows.load(tmp_path / "other.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ConfigError, match="sparse rows"):
        SparseRows.load(tmp_path / "array.npy")
    objects = tmp_path / "objects.npz"
    np.savez(objects, indptr=np.array([object()]), format=1, indices=1, values=1, width=1)
    with pytest.raises(ConfigError):
        SparseRows.load(objects)
    with pytest.raises(FileNotFoundError):
        SparseRows.load(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0, 1], [0], [float("nan")], 3), InputError, "finite and greater than 0.*nan.*row 0"),
        (([0, 1], [0], [float("inf")], 3), InputError, "finite"),
        (([0, 0, 1], [0], [-1.0], 3), InputError, "row 1"),
        (([0, 1], [0], [0.0], 3), InputError, "greater than 0"),
        (([0, 1], [0], [1e-60], 3), InputError, "in float32"),
        (([0, 1], [0], [1e60], 3), InputError, "in float32"),
        (([0, 1], [3], [1.0], 3), InputError, r"\[0, 3\), got 3"),
        (([0, 1], [-1], [1.0], 3), InputError, "got -1"),
        (([0, 1], [2**32], [1.0], 3), InputError, "got 4294967296"),
        (([0, 2], [1, 1], [1.0, 1.0], 3), InputError, "1 before 1 in row 0"),
        (([0, 0, 2], [2, 1], [1.0, 1.0], 3), InputError, "2 before 1 in row 1"),
        (([0, 2], [0, 1], [1.0], 3), ShapeError, "2 indices and 1 values"),
        (([0, 1], [0, 1], [1.0, 1.0], 3), ShapeError, r"indptr\[-1\] = 1"),
        (([1, 2], [0, 1], [1.0, 1.0], 3), ShapeError, "start at 0"),
        (([0, 2, 1, 2], [0, 1], [1.0, 1.0], 3), ShapeError, "never fall"),
        (([], [], [], 3), ShapeError, "start at 0"),
        (([0.0, 1.0], [0], [1.0], 3), ShapeError, "`indptr` must hold integers"),
        (([0, 1], [0.5], [1.0], 3), ShapeError, "`indices` must hold integers"),
        (([0, 1], [0], ["a"], 3), ShapeError, "real numbers"),
        (([[0, 1]], [0], [1.0], 3), ShapeError, "flat array"),
        (([0], [], [], 0), ShapeError, "vocabulary size"),
        (([0], [], [], True), ShapeError, "integer"),
    ],
)
def test_broken_arrays_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        SparseRows(*arguments)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ({1: 1.0}, TypeError, "pass \\[mapping\\]"),
        ([{"a": 1.0}], InputError, "'a' in row 0"),
        ([{True: 1.0}], InputError, "True"),
        ([{}, {1: -1.0}], InputError, "row 1"),
        ([{1: float("nan")}], InputError, "nan"),
        ([{1: "x"}], InputError, "'x'"),
        ([{99: 1.0}], InputError, "got 99"),
        ([{-1: 1.0}], InputError, "got -1"),
    ],
)
def test_broken_dictionaries_are_refused(rows, error, message):
    with pytest.raises(error, match=message):
        SparseRows.from_dicts(rows, WIDTH)


def test_zero_weights_in_dictionaries_mean_absent():
    assert SparseRows.from_dicts([{1: 0.0, 2: 1.0}], WIDTH).to_dicts() == [{2: 1.0}]


def test_empty_rows_first_middle_and_last():
    rows = SparseRows([0, 0, 2, 2, 3, 3], [1, 2, 0], [1.0, 2.0, 3.0], 4)
    assert rows.to_dicts() == [{}, {1: 1.0, 2: 2.0}, {}, {0: 3.0}, {}]
    assert SparseRows.empty(2, 4).to_dicts() == [{}, {}]
    assert len(SparseRows.empty(0, 4)) == 0
    assert rows[4].to_dicts() == rows[-1].to_dicts() == [{}]


def test_rows_are_read_only():
    rows = SparseRows.from_dicts([{1: 1.0}], 4)
    with pytest.raises(ValueError, match="read-only"):
        rows.values[0] = 2.0
    with pytest.raises(AttributeError, match="read-only"):
        rows.width = 9
    with pytest.raises(TypeError):
        hash(rows)


def test_wrong_selections_are_index_errors():
    rows = SparseRows.from_dicts([{1: 1.0}], 4)
    for key in (1, -2, [1], [[0]], [0.5], np.array([True, False])):
        with pytest.raises(IndexError):
            rows[key]


def test_widths_must_agree():
    rows, others = SparseRows.empty(1, 4), SparseRows.empty(1, 5)
    with pytest.raises(ShapeError, match="4 and 5"):
        rows.dot(others)
    with pytest.raises(ShapeError, match=r"\[4, 5\]"):
        SparseRows.concat([rows, others])
    with pytest.raises(ShapeError, match=r"\[4, D\]"):
        rows.dot_dense(np.zeros((3, 2)))
    with pytest.raises(InputError, match="at least one"):
        SparseRows.concat([])
    with pytest.raises(ConfigError, match="at least 1"):
        rows.topk(0)
    assert rows != others
    assert rows != "rows"


def test_allclose_allows_only_weights_to_differ():
    rows = SparseRows.from_dicts([{1: 1.0, 2: 2.0}], 4)
    assert rows.allclose(SparseRows.from_dicts([{1: 1.0 + 1e-7, 2: 2.0}], 4))
    assert not rows.allclose(SparseRows.from_dicts([{1: 1.001, 2: 2.0}], 4))
    assert not rows.allclose(SparseRows.from_dicts([{1: 1.0, 3: 2.0}], 4))
