"""Hypothesis strategies: ragged batches and logits that look for trouble."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor


class Batch(NamedTuple):
    """Inputs of `project_pool`, float64."""

    hidden: Tensor
    cu_seqlens: Tensor
    weight: Tensor
    bias: Tensor | None


def bounds_of(lengths: list[int]) -> Tensor:
    """Running sum of document lengths, [B + 1]."""
    return torch.tensor([0, *lengths]).cumsum(0)


@st.composite
def lengths(draw, max_documents: int = 6, max_length: int = 20) -> list[int]:
    """Documents without tokens, of one token, and runs of equal lengths come up often."""
    length = st.one_of(st.integers(0, 2), st.integers(0, max_length))
    found = draw(st.lists(length, min_size=0, max_size=max_documents))
    if found and draw(st.booleans()):
        found = found + [found[-1]] * draw(st.integers(0, 3))
    return found


@st.composite
def batches(draw, *, special: bool = False) -> Batch:
    """Ragged batches; small integers among the numbers make ties and zeros of either sign.

    Args:
        draw: Given by hypothesis.
        special: Also -inf, inf and NaN among the hidden states.
    """
    sizes = draw(lengths())
    T, H, V = sum(sizes), draw(st.sampled_from([1, 2, 3, 7, 16, 33])), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    hidden = torch.randn((T, H), generator=generator, dtype=torch.float64)
    weight = torch.randn((V, H), generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        hidden, weight = hidden.round(), weight.round()
    if special and T:
        chance = torch.rand((T, H), generator=generator)
        for limit, value in ((0.03, torch.nan), (0.06, torch.inf), (0.09, -torch.inf)):
            hidden = hidden.masked_fill((chance < limit) & (chance > limit - 0.03), value)
    bias = torch.randn(V, generator=generator, dtype=torch.float64) if draw(st.booleans()) else None
    return Batch(hidden, bounds_of(sizes), weight, bias)


class Choice(NamedTuple):
    """Inputs of `select_topk`."""

    logits: Tensor
    k: int | None
    activation: str
    lexical: tuple[Tensor, Tensor] | None


@st.composite
def choices(draw) -> Choice:
    """Logits with ties, infinities, NaN and zeros of either sign; k of 1, of V and between."""
    B, V = draw(st.integers(0, 5)), draw(st.integers(1, 40))
    number = st.one_of(
        st.sampled_from([-0.0, 0.0, 1.0, 2.0, -1.0, -200.0, torch.inf, -torch.inf, torch.nan]),
        st.floats(-50, 50, width=32),
    )
    cells = draw(st.lists(number, min_size=B * V, max_size=B * V))
    logits = torch.tensor(cells, dtype=torch.float32).reshape(B, V)
    k = draw(st.one_of(st.none(), st.just(1), st.just(V), st.integers(1, V)))
    activation = draw(st.sampled_from(["elu1p", "log1p_relu", "double_log1p_relu", "none"]))
    lexical = None
    if draw(st.booleans()):
        sets = draw(st.lists(st.lists(st.integers(0, V - 1), max_size=4), min_size=B, max_size=B))
        flat = [column for columns in sets for column in columns]
        lexical = (bounds_of([len(columns) for columns in sets]), torch.tensor(flat).long())
    return Choice(logits, k, activation, lexical)
