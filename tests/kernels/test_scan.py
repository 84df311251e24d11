"""The scan in integers: its products, its bound, and that selections keep their bits."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdr_db.kernels import ACTIVATIONS
from vdr_db.kernels.cpu import products
from vdr_db.kernels.cpu import scan as scans
from vdr_db.kernels.cpu.products import PackedRows, exact_levels, largest
from vdr_db.kernels.cpu.scan import encoded, scan
from vdr_db.kernels.plain import select_topk

THREADS = 1


def test_the_written_bytes_are_models():
    rows = np.ones((5, 3), np.int8)
    for written, operators in (
        (products.float_graph(), ["Transpose", "MatMul", "ReduceMax"]),
        (products.integer_graph(rows, 128), ["MatMulInteger"]),
    ):
        model = onnx.load_from_string(written)
        onnx.checker.check_model(model, full_check=True)
        assert [node.op_type for node in model.graph.node] == operators


@pytest.mark.parametrize("positions", [1, 7, 16, 129, 1100])
def test_products_of_integers_are_exact_up_to_the_levels(positions):
    rng = np.random.default_rng(positions)
    levels = exact_levels(THREADS)
    assert levels in (63, 127)
    packed = PackedRows(levels, THREADS)
    rows = rng.choice(np.array([-127, -126, 0, 1, 127], np.int8), (2500, 72))
    packed.add(rows[:1000])
    packed.add(rows[1000:])
    states = rng.choice(np.array([-levels, levels, 0, 1]), (positions, 72))
    wanted = (rows.astype(np.int64) @ states.T).max(1)
    assert np.array_equal(packed.largest((states + packed.zero).astype(np.uint8)), wanted)
    assert packed.nbytes == rows.nbytes


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_among_any_others(threads):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((5000, 160)).astype(np.float32)
    states = rng.standard_normal((600, 160)).astype(np.float32)
    for positions in (1, 3, 40, 600):
        whole = largest(rows, states[:positions], threads)
        np.testing.assert_allclose(whole, (rows @ states[:positions].T).max(1), atol=1e-4)
        for count in (1, 17, 900):
            chosen = rng.permutation(5000)[:count]
            some = largest(rows[chosen], states[:positions], threads)
            assert np.array_equal(some, whole[chosen])


# The bound, on numbers that look for its limits

AWKWARD = [0.0, 1.0, -1.0, 1e-3, 300.0, -7e4, 1e-38, -3e-42, 1e-20, 0.5, 63.5, 1e9]
KINDS = ["plain", "outlier dimension", "equal", "zero rows", "tiny", "one direction", "awkward"]


def made(kind, rng, count, H):
    """A matrix `[count, H]` of a kind."""
    found = rng.standard_normal((count, H))
    if kind == "outlier dimension":
        found[:, 0] *= 1000
    elif kind == "equal":
        found[:] = found[0]
    elif kind == "zero rows":
        found[rng.random(count) < 0.6] = 0
    elif kind == "tiny":
        found *= 10.0 ** rng.integers(-44, -15)
    elif kind == "one direction":
        found = np.abs(found[:1]) * rng.uniform(0.9, 1.1, (count, 1)) + 1e-3 * found
    elif kind == "awkward":
        found = rng.choice(AWKWARD, (count, H))
    return found.astype(np.float32)


cases = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),  # positions
    st.integers(1, 24),  # H
    st.booleans(),
)


def drawn(case, V):
    rows_kind, states_kind, seed, positions, H, has_bias = case
    rng = np.random.default_rng(seed)
    rows, states = made(rows_kind, rng, V, H), made(states_kind, rng, positions, H)
    bias = made("plain", rng, 1, V)[0] if has_bias else None
    codes = encoded(rows.__getitem__, V, bias, THREADS)

    def exact(columns):
        found = largest(rows[columns], states, THREADS)
        return found if bias is None else found + bias[columns]

    return rows, states, bias, codes, exact


@settings(max_examples=150, deadline=None)
@given(cases)
def test_no_score_is_above_its_bound(case):
    V = 48
    rows, states, bias, codes, exact = drawn(case, V)
    bounds = scans._bounds(codes, states)
    if bounds is None:  # only products that might overflow
        assert np.abs(states).max() * np.abs(rows).max() > 1e9
        return
    near, above = (part.astype(np.float64) for part in bounds)
    true = (rows.astype(np.float64) @ states.T.astype(np.float64)).max(1)
    true += 0 if bias is None else bias
    for scores in (true, exact(np.arange(V)).astype(np.float64)):
        assert (scores <= above).all()
        assert (scores >= near - (above - near) * (1 + 1e-6)).all()


@settings(max_examples=150, deadline=None)
@given(cases, st.sampled_from(ACTIVATIONS), st.data())
def test_a_selection_keeps_its_bits(case, activation, data):
    V = data.draw(st.sampled_from([1, 5, 90]))
    _, states, _, codes, exact = drawn(case, V)
    k = data.draw(st.one_of(st.none(), st.integers(1, V)))
    own = data.draw(st.one_of(st.none(), st.lists(st.integers(0, V - 1), max_size=5)))
    always = None if own is None else np.array(own, np.int32)
    options = {"activation": activation, "lexical": always}
    full = exact(np.arange(V))
    found = scan(codes, states, exact, k=k, activation=activation, always=always)
    if found is None:
        return
    for wanted, got in zip(
        select_topk(full, k, **options), select_topk(found, k, **options), strict=True
    ):
        assert np.array_equal(wanted, got)
    computed = np.flatnonzero(found > -np.inf)
    assert np.array_equal(found[computed], full[computed])


def test_few_columns_of_a_head_that_separates_are_computed():
    """Of 20,000 columns with 200 high ones, k = 100: hardly more than 100 in fp32."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((20_000, 64)).astype(np.float32)
    states = rng.standard_normal((30, 64)).astype(np.float32)
    rows[7:20_000:100] += states[0]
    computed = []

    def exact(columns):
        computed.append(columns.size)
        return largest(rows[columns], states, THREADS)

    codes = encoded(rows.__getitem__, 20_000, None, THREADS)
    found = scan(codes, states, exact, k=100, activation="elu1p")
    assert found is not None
    assert sum(computed) < 260
    assert codes.nbytes < rows.nbytes / 2


@pytest.mark.parametrize("where", ["states", "rows", "scores"])
def test_what_is_not_finite_takes_the_plain_way_or_shows(where):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((400, 16)).astype(np.float32)
    states = rng.standard_normal((5, 16)).astype(np.float32)
    if where == "states":
        states[2, 3] = np.nan
    elif where == "rows":
        rows[17, 2] = np.inf
        rows[18] = np.nan
    else:
        rows *= np.float32(1e20)
        states *= np.float32(1e19)

    def exact(columns):
        return largest(rows[columns], states, THREADS)

    codes = encoded(rows.__getitem__, 400, None, THREADS)
    found = scan(codes, states, exact, k=9, activation="log1p_relu")
    if where != "rows":
        assert found is None
    elif found is not None:
        assert np.isnan(found[18])


def test_where_all_columns_have_a_weight_there_is_nothing_to_scan():
    rows = np.eye(40, dtype=np.float32)
    codes = encoded(rows.__getitem__, 40, None, THREADS)
    for k in (None, 39):
        assert scan(codes, rows, lambda c: c, k=k, activation="elu1p") is None
