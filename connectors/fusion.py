"""Reciprocal rank fusion (RRF): rankings of several searches joined into one.

Source: Cormack, Clarke and Buettcher 2009, "Reciprocal rank fusion outperforms Condorcet and
individual rank learning methods".
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import groupby
from typing import Any, TypeVar

from vdr_db.errors import ConfigError

__all__ = ["checked_weight", "fused", "paged", "settled"]

Item = TypeVar("Item", bound=Hashable)

# Beyond so many results the order of equal scores is left to the engine.
_MOST_TIES = 10_000


def fused(
    rankings: Sequence[Sequence[Item]],
    constant: float,
    order: Callable[[Item], Any],
    weights: Sequence[float] | None = None,
) -> dict[Item, float]:
    """Item → sum of weight / (constant + rank), ranks from 0; best first, equal ones by `order`.

    Each ranking has one of `weights`, 1 without.
    """
    scores: dict[Item, float] = {}
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
        for rank, item in enumerate(ranking):
            scores[item] = scores.get(item, 0.0) + weight / (constant + rank)
    return {item: scores[item] for item in sorted(scores, key=lambda i: (-scores[i], order(i)))}


def paged(
    rankings: Callable[[int], Sequence[Sequence[tuple[Item, float]]]],
    constant: float,
    order: Callable[[Item], Any],
    *,
    depth: int,
    limit: int,
    offset: int,
    weights: Sequence[float] | None = None,
) -> list[tuple[Item, float]]:
    """A page of the fusion of rankings to `depth`; what they hold below follows, `depth` at a time.

    So page after page shows every item once, whatever the size of the pages. An item from below
    gets no larger score than those before it.

    Args:
        rankings: Gives that many (item, score) of each ranking, best first.
        constant: Larger values give the first ranks less weight.
        order: Sort key of items with equal scores.
        depth: Items of each ranking that are fused at a time.
        limit: Items wanted.
        offset: Items to leave out at the start.
        weights: One for each ranking, 1 without.
    """
    reach = depth * -(-(offset + limit) // depth)
    settled_rankings = settled(rankings, reach, order)
    found: dict[Item, float] = {}
    for below in range(depth, reach + 1, depth):
        least = min(found.values(), default=float("inf"))
        scores = fused([one[:below] for one in settled_rankings], constant, order, weights)
        found.update((i, min(score, least)) for i, score in scores.items() if i not in found)
    return list(found.items())[offset : offset + limit]


def checked_weight(name: str, weight: float) -> float:
    """A weight of a ranking; one that is no number of at least 0 is a `ConfigError`."""
    if isinstance(weight, bool) or not 0 <= float(weight) < float("inf"):
        raise ConfigError(f"`{name}` must be a number of at least 0, got {weight!r}.")
    return float(weight)


def settled(
    rankings: Callable[[int], Sequence[Sequence[tuple[Item, float]]]],
    count: int,
    order: Callable[[Item], Any],
) -> list[list[Item]]:
    """The first `count` items of each ranking, of equal scores those that come first in `order`.

    An engine cuts equal scores off wherever it likes, so it is asked until the last are all there.
    """
    asked = count + 1
    while True:
        answers = rankings(asked)
        torn = any(len(one) == asked and one[-1][1] == one[count - 1][1] for one in answers)
        if not torn or asked > _MOST_TIES:
            break
        asked *= 4
    return [
        [
            item
            for _, equal in groupby(one, key=lambda pair: pair[1])
            for item in sorted((item for item, _ in equal), key=order)
        ][:count]
        for one in answers
    ]
