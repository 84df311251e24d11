"""Training objectives, one function each, as plain functions of scores and vectors.

Scores are inner products. A row is a query, a column a document; columns begin with the positives,
so that the positive of row i is column i, and whatever follows are negatives:

    scores[i, j] = query_i . document_j            [N, M], M >= N

Nothing here knows about models, devices or ranks: with several ranks, rows are a rank's own queries
and `first` says which column their positives begin at (see `vdr_db.training.objective`).

Sources
    VDR: Zhou et al., "Retrieval-based Disentangled Representation Learning with Natural Language
    Supervision", ICLR 2024; its published code, `src/ir/training/loss_utils.py`.
    InfoNCE: van den Oord et al. 2018, https://arxiv.org/abs/1807.03748.
    FLOPS: Paria et al. 2020, https://arxiv.org/abs/2004.05665; in SPLADE: Formal et al. 2021,
    https://arxiv.org/abs/2107.05720.
    Margin-MSE: Hofstätter et al. 2020, https://arxiv.org/abs/2010.02666.
    KL distillation: Hinton et al. 2015, https://arxiv.org/abs/1503.02531; on rankings: Lin et al.
    2021, https://arxiv.org/abs/2010.11386.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vdr_db.errors import ConfigError, ShapeError

__all__ = [
    "SYMMETRIES",
    "Symmetry",
    "contrastive_mask",
    "flops",
    "imitation",
    "info_nce",
    "kl_distillation",
    "margin_mse",
    "svdr",
    "vdr",
]

Symmetry = Literal["none", "mean"]
SYMMETRIES: tuple[Symmetry, ...] = get_args(Symmetry)


def info_nce(
    scores: Tensor,
    *,
    temperature: float = 1.0,
    symmetry: Symmetry = "mean",
    passage_scores: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """Negative log-likelihood of the positives among the others of the batch, a scalar.

        l_q = mean_i -log softmax(scores[i, :] / t)[first + i]
        l_p = mean_i -log softmax(passage_scores[i, :] / t)[first + i]

        "none"    l_q
        "mean"    (l_q + l_p) / 2             VDR's code

    The softmax of l_p runs over queries only: negatives are never anchors.

    Args:
        scores: `[N, M]`, float.
        temperature: t, above 0.
        symmetry: How the two directions are joined.
        passage_scores: `[N, Q]`, scores of the N positives (rows) against all Q queries; None takes
            the transpose of `scores[:, :N]`, which is right on a single rank.
        first: Column of the first row's positive, in both score matrices.

    Raises:
        ShapeError: A row has no column for its positive.
        ConfigError: `temperature` or `symmetry` is impossible.

    Source: Zhou et al. 2024; van den Oord et al. 2018.
    """
    _check_scores(scores, first)
    _check_temperatures(temperature=temperature)
    if symmetry not in SYMMETRIES:
        raise ConfigError(f"`symmetry` must be one of {SYMMETRIES}, got {symmetry!r}.")
    N = scores.shape[0]
    target = torch.arange(first, first + N, device=scores.device)
    query_loss = F.cross_entropy(scores / temperature, target)
    if symmetry == "none":
        return query_loss
    if passage_scores is None:
        passage_scores = scores[:, first : first + N].T
    _check_scores(passage_scores, first)
    return (query_loss + F.cross_entropy(passage_scores / temperature, target)) / 2


def vdr(parametric: Tensor, lexical: Tensor) -> Tensor:
    """VDR's objective: the mean of its two entries into a document, each an `info_nce`.

        L = 1/2 [ nll(gate(V(q)), V(p)) + nll(BoW(q), V(p)) ]

    Source: Zhou et al. 2024; its code with `semi=False`.
    """
    return (parametric + lexical) / 2


def svdr(
    query_gated: Tensor, document_gated: Tensor, query_bag: Tensor, document_bag: Tensor
) -> Tensor:
    """The semi-parametric objective: both sides gated, both sides as bags of tokens.

        L = 1/4 [ nll(gate(V(q)), V(p)) + nll(V(q), gate(V(p)))
                  + nll(BoW(q), V(p)) + nll(V(q), BoW(p)) ]

    Source: the code of Zhou et al. 2024 with `semi=True`.
    """
    return (query_gated + document_gated + query_bag + document_bag) / 4


def contrastive_mask(bags: Tensor) -> Tensor:
    """Hands every column that no text of the batch mentions to exactly one row, `[R, V]` bool.

        M[r, c] = (c mod R == r) and (bags[s, c] == 0 for all s)

    Joined to the rows' bags, and taken out of the positives' vectors, it lets other rows' documents
    push those columns down.

    Args:
        bags: `[R, V]`, non-negative; above 0 where a text mentions a column.

    Raises:
        ShapeError: `bags` has no row.

    Source: the code of Zhou et al. 2024, `utils/sparsify_utils.py`; their appendix C.
    """
    R, V = bags.shape
    if R == 0:
        raise ShapeError("`bags` must have at least one row, got none; pass a non-empty batch.")
    owner = torch.arange(V, device=bags.device) % R
    rows = torch.arange(R, device=bags.device)
    unseen = (bags == 0).all(dim=0)
    return (owner == rows[:, None]) & unseen


def flops(weights: Tensor) -> Tensor:
    """FLOPS regulariser: the sum over columns of the squared mean weight.

        L = sum_v ( 1/B sum_b |weights[b, v]| )^2

    Args:
        weights: `[B, V]`, after activation. With several ranks, the mean over all of them belongs
            here: pass `[1, V]` of gathered column means.

    Source: Paria et al. 2020; Formal et al. 2021.
    """
    return weights.abs().mean(dim=0).square().sum()


def margin_mse(scores: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of student's and teacher's margins between positive and negatives.

        L = mean_{i, j >= 1} ( (s[i,0] - s[i,j]) - (t[i,0] - t[i,j]) )^2

    Args:
        scores: `[N, C]`, C >= 2: each query's own candidates, the positive first.
        teacher: `[N, C]`, the teacher's scores of the same; NaN where there is no candidate.

    Raises:
        ShapeError: Shapes disagree, or there is no negative.

    Source: Hofstätter et al. 2020.
    """
    _check_candidates(scores, teacher)
    wanted = teacher[:, :1] - teacher[:, 1:]
    present = ~wanted.isnan()
    error = (scores[:, :1] - scores[:, 1:]) - wanted.nan_to_num()
    return (error.square() * present).sum() / present.sum().clamp_min(1)


def kl_distillation(
    scores: Tensor, teacher: Tensor, *, temperature: float = 1.0, teacher_temperature: float = 1.0
) -> Tensor:
    """Kullback-Leibler divergence from teacher to student over each query's candidates.

        T = softmax(teacher / t_t),  S = softmax(scores / t_s)
        L = mean_i sum_j T[i,j] ( log T[i,j] - log S[i,j] )

    Args:
        scores: `[N, C]`, C >= 2, the student's scores of each query's candidates.
        teacher: `[N, C]`, the teacher's scores of the same; NaN where there is no candidate.
        temperature: t_s, above 0.
        teacher_temperature: t_t, above 0.

    Raises:
        ShapeError: Shapes disagree, or there is one candidate only.
        ConfigError: A temperature is not above 0.

    Source: Hinton et al. 2015; Lin et al. 2021.
    """
    _check_candidates(scores, teacher)
    _check_temperatures(temperature=temperature, teacher_temperature=teacher_temperature)
    absent = teacher.isnan()
    # A large negative number, not -inf: 0 * (-inf) would make the gradient NaN.
    low = torch.finfo(scores.dtype).min / 4
    student = F.log_softmax((scores / temperature).masked_fill(absent, low), dim=1)
    taught = F.log_softmax((teacher / teacher_temperature).masked_fill(absent, low), dim=1)
    terms = taught.exp() * (taught - student)
    return terms.masked_fill(absent, 0).sum(dim=1).mean()


def imitation(vectors: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the student's vectors from the teacher's, relative to the teacher's.

        L = mean_b |s_b - t_b|^2 / |t_b|^2

    Args:
        vectors: `[B, V]`, the student's weights.
        teacher: `[B, V]`, the teacher's of the same texts; a row of zeros counts 0.

    Raises:
        ShapeError: Shapes disagree.

    Source: after Reimers and Gurevych 2020, https://arxiv.org/abs/2004.09813 (dense embeddings);
    relative here, because the number of large weights varies between texts.
    """
    if vectors.shape != teacher.shape or vectors.dim() != 2:
        raise ShapeError(
            f"`vectors` and `teacher` must both be [B, V], got {tuple(vectors.shape)} and "
            f"{tuple(teacher.shape)}; both must cover one vocabulary."
        )
    size = teacher.square().sum(dim=1)
    error = (vectors - teacher).square().sum(dim=1)
    return (error / size.clamp_min(torch.finfo(size.dtype).tiny)).where(size > 0, 0.0).mean()


def _check_temperatures(**temperatures: float) -> None:
    for name, value in temperatures.items():
        if not value > 0:
            raise ConfigError(f"`{name}` must be above 0, got {value}.")


def _check_scores(scores: Tensor, first: int) -> None:
    if scores.dim() != 2 or scores.shape[0] == 0 or first < 0:
        raise ShapeError(
            f"scores must be [N, M] with at least one row, got {tuple(scores.shape)} and "
            f"`first={first}`; pass a row for each query."
        )
    if scores.shape[1] < first + scores.shape[0]:
        raise ShapeError(
            f"scores must have a column for the positive of each row, so at least "
            f"{first + scores.shape[0]}, got {tuple(scores.shape)}; put the positives first."
        )


def _check_candidates(scores: Tensor, teacher: Tensor) -> None:
    if scores.dim() != 2 or scores.shape != teacher.shape or scores.shape[1] < 2:
        raise ShapeError(
            "`scores` and `teacher` must both be [N, C] with C >= 2 candidates, got "
            f"{tuple(scores.shape)} and {tuple(teacher.shape)}; give each query a positive and at "
            "least one negative with teacher scores."
        )
