"""Mining: right answers never come back as negatives, and neighbours end up in one batch."""

from pathlib import Path

import pytest
import training_samples

from vdr_db import SparseEncoder
from vdr_db.errors import ConfigError, InputError
from vdr_db.training.examples import Example, Source, read_examples
from vdr_db.training.negatives import Bm25Ranker, ModelRanker, arrange, mine, write_scored

TOPICS = ("blue paint paper", "green sea water", "moon star theory")


def topical():
    """Three topics of four examples; two queries share a right answer word for word."""
    examples = [
        Example(f"{topic} {word}", (f"{topic} {topic} {word}",))
        for topic in TOPICS
        for word in ("cat", "dog", "book", "light")
    ]
    examples[1] = Example(examples[1].query, examples[0].positives)
    return examples


class FixedRanker:
    def __init__(self, documents):
        self.documents = documents

    def rank(self, queries, depth):
        return [[(i, 10.0 - i) for i in range(min(depth, len(self.documents)))] for _ in queries]


@pytest.mark.parametrize("name", ["bm25", "model"])
def test_negatives_are_near_and_never_right(tmp_path, name):
    examples = topical()

    def ranker(documents):
        if name == "bm25":
            pytest.importorskip("bm25s")
            return Bm25Ranker(documents)
        pytest.importorskip("qdrant_edge")
        training_samples.settings(tmp_path)
        return ModelRanker(documents, SparseEncoder.from_pretrained(tmp_path / "bert"))

    mined = list(mine(examples, ranker, count=2, depth=11, with_scores=True))
    assert [item.query for item in mined] == [item.query for item in examples]
    for item in mined:
        assert len(item.negatives) == 2
        assert not set(item.negatives) & set(item.positives)
        assert len(item.scores) == 3
        assert item.scores[1] >= item.scores[2]
        if name == "bm25":
            topic = item.query.rsplit(" ", 1)[0]
            assert all(negative.startswith(topic) for negative in item.negatives)


def test_skipping_the_best_hits_and_scores_of_missing_positives():
    examples = [Example(f"q{i}", (f"p{i}",)) for i in range(5)]
    mined = list(mine(examples, FixedRanker, count=2, depth=4, skip=1, with_scores=True))
    assert mined[0].negatives == ("p1", "p2")
    assert mined[0].scores == (10.0, 9.0, 8.0)
    assert mined[1].negatives == ("p2", "p3")
    # Beyond the depth: the ranker has no score for it.
    assert mined[4].scores == (0.0, 9.0, 8.0)


def test_arranged_examples_have_their_negatives_beside_them():
    examples = [
        Example(f"q{i}", (f"p{i}",), (f"p{(i + 4) % 8}", f"p{(i + 1) % 8}")) for i in range(8)
    ]
    ordered = arrange(examples, 2)
    assert sorted(item.query for item in ordered) == [f"q{i}" for i in range(8)]
    for first, second in zip(ordered[::2], ordered[1::2], strict=True):
        assert int(second.query[1]) == (int(first.query[1]) + 4) % 8


def test_written_examples_read_back(tmp_path):
    path = tmp_path / "mined.jsonl"
    examples = [
        Example("q", ("p", "é"), ("n",), (1.5, -2.0)),
        Example("r", ("s",), ("t",)),
    ]
    assert write_scored(examples, path) == 2
    back = list(read_examples(Source(path)))
    assert [(e.query, e.positives, e.negatives, e.scores) for e in back] == [
        (e.query, e.positives, e.negatives, e.scores) for e in examples
    ]
    assert "é" in path.read_text("utf-8")


def test_impossible_requests():
    with pytest.raises(ConfigError, match="depth"):
        list(mine(topical(), FixedRanker, count=8, depth=4))
    with pytest.raises(InputError, match="at least one example"):
        list(mine([], FixedRanker, count=1))
    with pytest.raises(ConfigError, match="group"):
        arrange(topical(), 1)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_scored([], Path(__file__) / "no folder")
