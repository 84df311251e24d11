"""Reciprocal rank fusion, and pages of it that miss nothing."""

from __future__ import annotations

import random

import pytest

from vdr_db.connectors.fusion import fused, paged, settled


def test_ranks_are_fused_by_their_reciprocals():
    assert list(fused([["a", 2], [2, "b"]], 61, str).items()) == [
        (2, 1 / 62 + 1 / 61),
        ("a", 1 / 61),
        ("b", 1 / 62),
    ]
    assert next(iter(fused([["z"], [7]], 1, str))) == 7


class Engine:
    """Two rankings of items with many equal scores, which it cuts off in any order."""

    def __init__(self, count: int, levels: int) -> None:
        self.chance = random.Random(count)
        self.scores = [
            {i: float(self.chance.randrange(levels)) for i in range(count)} for _ in range(2)
        ]
        self.calls: list[int] = []

    def __call__(self, count: int) -> list[list[tuple[int, float]]]:
        self.calls.append(count)
        rankings = []
        for scores in self.scores:
            items = list(scores.items())
            self.chance.shuffle(items)
            rankings.append(sorted(items, key=lambda pair: -pair[1])[:count])
        return rankings


@pytest.mark.parametrize("levels", [2, 7, 10_000])
@pytest.mark.parametrize("page", [1, 7, 10, 100, 300])
def test_pages_show_every_item_once_and_in_one_order(levels, page):
    engine = Engine(300, levels)
    pages = [
        paged(engine, 2, int, depth=40, limit=page, offset=offset) for offset in range(0, 300, page)
    ]
    found = [item for one in pages for item, _ in one]
    assert sorted(found) == list(range(300))
    scores = [score for one in pages for _, score in one]
    assert scores == sorted(scores, reverse=True)
    assert found == [item for item, _ in paged(engine, 2, int, depth=40, limit=300, offset=0)]


def test_within_the_depth_a_page_is_the_fusion_of_both_rankings():
    engine = Engine(100, 10_000)
    tops = settled(engine, 40, int)
    assert (
        paged(engine, 60, int, depth=40, limit=20, offset=5)
        == list(fused(tops, 60, int).items())[5:25]
    )


def test_equal_scores_at_the_cut_are_asked_for_until_all_are_there():
    engine = Engine(300, 1)
    assert settled(engine, 10, int) == [list(range(10))] * 2
    assert max(engine.calls) > 300
    engine = Engine(300, 10_000_000)
    settled(engine, 10, int)
    assert engine.calls == [11]
