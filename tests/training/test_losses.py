"""Every objective against its statement in NumPy, and its gradient against differences."""

import numpy as np
import pytest
import torch

from vdr_db.errors import ConfigError, ShapeError
from vdr_db.training import losses


def log_softmax(scores, axis=1):
    shifted = scores - scores.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def nll(scores, targets):
    return -np.mean([row[target] for row, target in zip(log_softmax(scores), targets, strict=True)])


def tensor(values, grad=False):
    return torch.tensor(np.asarray(values), dtype=torch.float64, requires_grad=grad)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("temperature", [1.0, 0.07])
@pytest.mark.parametrize("negatives", [0, 3])
def test_info_nce_in_all_symmetries(rng, temperature, negatives):
    scores = rng.normal(size=(4, 4 + 4 * negatives))
    queries = nll(scores / temperature, range(4))
    # Negatives are never anchors: the passages' softmax runs over the four queries.
    passages = nll(scores[:, :4].T / temperature, range(4))
    expected = {
        "none": queries,
        "mean": (queries + passages) / 2,
    }
    for symmetry, value in expected.items():
        got = losses.info_nce(tensor(scores), temperature=temperature, symmetry=symmetry)
        assert got.item() == pytest.approx(value, rel=1e-12)


def test_ranks_share_of_info_nce(rng):
    """Rows of one rank, whose positives begin at a later column, with the other direction given."""
    scores = rng.normal(size=(6, 8))
    whole = losses.info_nce(tensor(scores))
    halves = [
        losses.info_nce(
            tensor(scores[start : start + 3]),
            passage_scores=tensor(scores[:, start : start + 3].T),
            first=start,
        )
        for start in (0, 3)
    ]
    assert (sum(halves) / 2).item() == pytest.approx(whole.item(), rel=1e-12)


def test_vdr_and_svdr_are_means_of_their_terms(rng):
    terms = [tensor(value) for value in rng.normal(size=4)]
    assert losses.vdr(*terms[:2]).item() == pytest.approx(np.mean([t.item() for t in terms[:2]]))
    assert losses.svdr(*terms).item() == pytest.approx(np.mean([t.item() for t in terms]))


def test_contrastive_mask_gives_unseen_columns_to_one_row_each():
    bags = np.zeros((3, 11))
    bags[0, [1, 4]] = 1
    bags[2, [4, 9]] = 1
    expected = np.zeros((3, 11), dtype=bool)
    for column in range(11):
        if not bags[:, column].any():
            expected[column % 3, column] = True
    got = losses.contrastive_mask(torch.tensor(bags)).numpy()
    np.testing.assert_array_equal(got, expected)


def test_flops(rng):
    weights = rng.normal(size=(5, 7))
    expected_flops = sum(np.abs(weights[:, v]).mean() ** 2 for v in range(7))
    assert losses.flops(tensor(weights)).item() == pytest.approx(expected_flops)


def test_margin_mse(rng):
    scores, teacher = rng.normal(size=(2, 3, 4))
    errors = [
        ((scores[i, 0] - scores[i, j]) - (teacher[i, 0] - teacher[i, j])) ** 2
        for i in range(3)
        for j in range(1, 4)
    ]
    got = losses.margin_mse(tensor(scores), tensor(teacher))
    assert got.item() == pytest.approx(np.mean(errors))


def test_kl_distillation(rng):
    scores, teacher = rng.normal(size=(2, 3, 4))
    student, taught = log_softmax(scores / 2.0), log_softmax(teacher / 0.5)
    expected = (np.exp(taught) * (taught - student)).sum(axis=1).mean()
    got = losses.kl_distillation(
        tensor(scores), tensor(teacher), temperature=2.0, teacher_temperature=0.5
    )
    assert got.item() == pytest.approx(expected)


def test_imitation(rng):
    vectors, teacher = rng.random((2, 3, 5))
    teacher[1] = 0
    terms = [
        np.sum((s - t) ** 2) / np.sum(t**2) if t.any() else 0.0
        for s, t in zip(vectors, teacher, strict=True)
    ]
    got = losses.imitation(tensor(vectors), tensor(teacher))
    assert got.item() == pytest.approx(np.mean(terms))


def test_absent_candidates_take_no_part_in_distillation(rng):
    scores, teacher = rng.normal(size=(2, 2, 4))
    teacher[0, 2:] = np.nan
    scores = tensor(scores, grad=True)
    kl = losses.kl_distillation(scores, tensor(teacher))
    first = losses.kl_distillation(scores[:1, :2], tensor(teacher[:1, :2]))
    second = losses.kl_distillation(scores[1:], tensor(teacher[1:]))
    assert kl.item() == pytest.approx((first + second).item() / 2)
    mse = losses.margin_mse(scores, tensor(teacher))
    (gradient,) = torch.autograd.grad(kl + mse, scores)
    assert torch.isfinite(gradient).all()
    assert (gradient[0, 2:] == 0).all()


@pytest.mark.parametrize("symmetry", ["none", "mean"])
def test_gradient_of_info_nce(rng, symmetry):
    scores = tensor(rng.normal(size=(3, 5)), grad=True)
    assert torch.autograd.gradcheck(
        lambda s: losses.info_nce(s, temperature=0.5, symmetry=symmetry), scores
    )


@pytest.mark.parametrize(
    "loss",
    [
        losses.margin_mse,
        losses.kl_distillation,
        losses.imitation,
        lambda s, t: losses.flops(s) + 0 * t.sum(),
    ],
    ids=["margin_mse", "kl", "imitation", "flops"],
)
def test_gradient_of_the_others(rng, loss):
    scores, teacher = rng.normal(size=(2, 3, 4))
    teacher = tensor(teacher)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), tensor(scores, grad=True))


def test_impossible_input_is_named():
    with pytest.raises(ShapeError, match="positives first"):
        losses.info_nce(torch.zeros(3, 2))
    with pytest.raises(ConfigError, match="temperature"):
        losses.info_nce(torch.zeros(2, 2), temperature=0.0)
    with pytest.raises(ConfigError, match="symmetry"):
        losses.info_nce(torch.zeros(2, 2), symmetry="both")
    with pytest.raises(ShapeError, match="at least one negative"):
        losses.margin_mse(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ConfigError, match="teacher_temperature"):
        losses.kl_distillation(torch.zeros(2, 2), torch.zeros(2, 2), teacher_temperature=0)
    with pytest.raises(ShapeError, match="one vocabulary"):
        losses.imitation(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="at least one row"):
        losses.contrastive_mask(torch.zeros(0, 4))
