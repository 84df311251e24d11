"""Gates and sparse products against dense ones, gradients included."""

import numpy as np
import pytest
import torch

from vdr_db.errors import ShapeError
from vdr_db.kernels import activate
from vdr_db.training.sparse_ops import (
    GatedRows,
    gate,
    pick_logits,
    score,
    weigh,
    winning_tokens,
)


@pytest.fixture
def dense_rows():
    """Rows with an empty one first, in the middle and last."""
    rng = np.random.default_rng(3)
    rows = rng.uniform(0.1, 2, (6, 9)) * (rng.random((6, 9)) < 0.4)
    rows[[0, 3, 5]] = 0
    return rows


def to_gated(rows, grad=False):
    owner, columns = np.nonzero(rows)
    indptr = np.searchsorted(owner, np.arange(len(rows) + 1))
    weights = torch.tensor(rows[owner, columns], dtype=torch.float64, requires_grad=grad)
    return GatedRows(torch.tensor(indptr), torch.tensor(columns), weights, rows.shape[1])


def test_products_with_dense_rows(dense_rows):
    rows = to_gated(dense_rows, grad=True)
    other = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    np.testing.assert_allclose(
        score(rows, other).detach().numpy(), dense_rows @ other.detach().numpy().T
    )

    def products(weights, matrix):
        return score(GatedRows(rows.indptr, rows.columns, weights, 9), matrix)

    assert torch.autograd.gradcheck(products, (rows.weights, other))


def test_dense_form_reordering_and_joining(dense_rows):
    rows = to_gated(dense_rows, grad=True)
    np.testing.assert_array_equal(rows.to_dense().detach().numpy(), dense_rows)
    places = torch.tensor([4, 0, 2, 2, 5])
    np.testing.assert_array_equal(rows.reordered(places).to_dense().detach(), dense_rows[places])
    twice = GatedRows.concat([rows, rows])
    np.testing.assert_array_equal(twice.to_dense().detach(), np.vstack([dense_rows] * 2))
    rows.reordered(places).weights.sum().backward()
    expected = np.bincount(places, minlength=6)[rows.rows]
    np.testing.assert_array_equal(rows.weights.grad, expected)


def test_gate_keeps_the_largest_and_the_own_columns():
    logits = torch.tensor([[3.0, -1.0, 2.0, 2.0, -9.0], [0.0, 1.0, -2.0, 5.0, 4.0]])
    own = (torch.tensor([0, 1, 2]), torch.tensor([4, 3]))
    kept = gate(logits, 2, lexical=own)
    assert kept.indptr.tolist() == [0, 3, 5]
    # Equal logits: the smaller column.
    assert kept.columns.tolist() == [0, 2, 4, 3, 4]


def test_picked_logits_and_their_gradient():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, generator=generator, requires_grad=True)
    tokens, columns = torch.tensor([0, 4, 4, 2]), torch.tensor([6, 6, 1, 0])
    got = pick_logits(hidden, weight, bias, tokens, columns)
    torch.testing.assert_close(got, (hidden @ weight.T + bias)[tokens, columns])
    assert torch.autograd.gradcheck(
        lambda h, w, b: pick_logits(h, w, b, tokens, columns), (hidden, weight, bias)
    )


def test_winning_tokens_are_first_argmaxima():
    rng = np.random.default_rng(5)
    hidden, weight = rng.integers(-2, 3, (9, 4)), rng.integers(-2, 3, (7, 4))
    spans = [(6, 9), (0, 1), (1, 6), (1, 6)]  # in any order, perhaps twice
    kept = [[0, 3, 6], [2], [], [1, 4, 5]]
    expected, ties = [], 0
    for (start, stop), columns in zip(spans, kept, strict=True):
        for column in columns:
            found = [sum(h[i] * weight[column][i] for i in range(4)) for h in hidden]
            best = max(found[start:stop])
            expected.append(start + found[start:stop].index(best))
            ties += found[start:stop].count(best) > 1
    assert ties
    got = winning_tokens(
        torch.tensor(hidden, dtype=torch.float16),
        torch.tensor(spans),
        torch.tensor(weight, dtype=torch.float16),
        torch.tensor([0, 3, 4, 4, 7]),
        torch.tensor([column for columns in kept for column in columns]),
    )
    assert got.tolist() == expected


def test_winning_tokens_are_exact_under_autocast():
    hidden, weight = torch.tensor([[1.0], [1.0 + 2**-12]]), torch.ones(1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        got = winning_tokens(
            hidden, torch.tensor([[0, 2]]), weight, torch.tensor([0, 1]), torch.tensor([0])
        )
    assert got.tolist() == [1]


@pytest.mark.parametrize("activation", ["elu1p", "log1p_relu", "double_log1p_relu", "none"])
def test_activations_take_their_slope_from_their_value(activation):
    logits = torch.tensor([-700.0, -3.0, -0.4, 0.3, 2.0, 800.0], dtype=torch.float64)
    torch.testing.assert_close(weigh(logits, activation), activate(logits, activation))
    assert torch.autograd.gradcheck(
        lambda z: weigh(z, activation), logits[1:-1].clone().requires_grad_()
    )
    extreme = logits.clone().requires_grad_()
    weigh(extreme, activation).sum().backward()
    assert torch.isfinite(extreme.grad).all()


def test_disagreeing_sizes_are_named(dense_rows):
    with pytest.raises(ShapeError, match="V = 9"):
        score(to_gated(dense_rows), torch.zeros(2, 8, dtype=torch.float64))
    with pytest.raises(ShapeError, match="one selection"):
        pick_logits(torch.zeros(1, 2), torch.zeros(1, 2), None, torch.zeros(1), torch.zeros(2))
