"""Training files of each kind, and bad lines named by file and number."""

import gzip
import json
import math

import numpy as np
import pytest

from vdr_db.errors import ConfigError, InputError
from vdr_db.training.data import Batches, make_batch
from vdr_db.training.examples import Example, Source, read_examples
from vdr_db.training.task import share_of_rank


def write(path, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path


def read(path, **options):
    return list(read_examples(Source(path, **options)))


DPR = {
    "question": "who",
    "positive_ctxs": [{"text": "him", "title": "Man"}, {"text": "her"}],
    "hard_negative_ctxs": [{"text": "it"}],
    "negative_ctxs": [{"text": "that", "title": ""}],
}
SCORED = {"query": "q", "positives": ["p"], "negatives": ["n", "m"], "scores": [3, 2.5, -1]}


def test_formats(tmp_path):
    pairs = write(tmp_path / "a.tsv", 'one "quoted\ttwo', "", "q\tp\tn1\tn2")
    first, second = read(pairs)
    assert first == Example('one "quoted', ("two",), (), None, f"{pairs}:1")
    assert second.negatives == ("n1", "n2")
    assert second.source == f"{pairs}:3"

    (dpr,) = read(write(tmp_path / "b.jsonl", DPR))
    assert dpr.positives == ("Man him", "her")
    assert dpr.negatives == ("it", "that")

    (scored,) = read(write(tmp_path / "c.jsonl", SCORED))
    assert scored.scores == (3.0, 2.5, -1.0)


def test_gzipped_file(tmp_path):
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress(b"q\tp\n"))
    assert read(path)[0].positives == ("p",)


def test_beir_folder_takes_the_best_grade_first(tmp_path):
    write(tmp_path / "corpus.jsonl", *({"_id": i, "text": f"text {i}"} for i in "abc"))
    write(tmp_path / "queries.jsonl", {"_id": "1", "text": "q"}, {"_id": "2", "text": "unjudged"})
    (tmp_path / "qrels").mkdir()
    write(tmp_path / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore", "1\ta\t1", "1\tb\t2")
    write(tmp_path / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", "2\tc\t1")
    (example,) = read(tmp_path)
    assert example.positives == ("text b", "text a")


BAD = [
    ("a.tsv", "only one cell", "query and positive"),
    ("a.tsv", "\tp", "query must not be empty"),
    ("a.tsv", "q\t ", "positive must not be empty"),
    ("a.tsv", "q\tp\t", "negative must not be empty"),
    ("d.jsonl", "{broken", "not a line of JSON"),
    ("d.jsonl", [1], "one JSON object"),
    ("d.jsonl", {"question": "q"}, "'positive_ctxs' is missing"),
    ("d.jsonl", {**DPR, "positive_ctxs": []}, "at least one positive"),
    ("d.jsonl", {**DPR, "question": 3}, "query must be a text, got int"),
    ("d.jsonl", {**DPR, "positive_ctxs": ["him"]}, "must be an object with a `text`"),
    ("d.jsonl", {**DPR, "negative_ctxs": "x"}, "'negative_ctxs' must be a list"),
    ("s.jsonl", {**SCORED, "scores": [1, 2]}, "3 finite numbers"),
    ("s.jsonl", {**SCORED, "scores": [1, 2, True]}, "3 finite numbers"),
    ("s.jsonl", '{"query": "q", "positives": ["p"], "scores": [NaN]}', "1 finite numbers"),
    ("s.jsonl", {**SCORED, "positives": "p"}, "'positives' must be a list"),
    ("s.jsonl", {**SCORED, "negatives": [None, "x"]}, "negative must be a text, got NoneType"),
]


@pytest.mark.parametrize(("name", "row", "message"), BAD)
def test_a_bad_line_is_named_or_counted(tmp_path, name, row, message):
    good = {"a.tsv": "q\tp", "d.jsonl": DPR, "s.jsonl": SCORED}[name]
    path = write(tmp_path / name, good, row, good)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2:")
    batches = Batches([Source(path)], 2, on_bad="skip")
    assert len(list(batches.epoch(0))) == 1
    assert batches.skipped == 1


def test_too_few_negatives(tmp_path):
    path = write(tmp_path / "a.tsv", "q\tp\tn", "r\to")
    with pytest.raises(InputError, match=r"a.tsv:2: expected at least 1 negatives, got 0"):
        list(Batches([Source(path)], 1, negatives=1).epoch(0))
    skipping = Batches([Source(path)], 1, negatives=1, on_bad="skip")
    assert [len(batch) for batch in skipping.epoch(0)] == [1]
    assert skipping.skipped == 1


def test_unknown_kind_of_file(tmp_path):
    path = write(tmp_path / "a.txt", "x")
    with pytest.raises(ConfigError, match="cannot tell the format"):
        read(path)
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "absent.tsv")


@pytest.fixture
def numbered(tmp_path):
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 60, 100)
    return write(tmp_path / "n.tsv", *(f"{i}\t{'x' * n}\ty\tz\tw" for i, n in enumerate(lengths)))


def queries(batches, epoch=0, **options):
    return [[example.query for example in batch] for batch in batches.epoch(epoch, **options)]


def test_an_epoch_is_a_function_of_seed_and_number(numbered):
    def batches(**options):
        return Batches([Source(numbered)], 8, **{"buffer": 30, "bucket": 4, "seed": 1} | options)

    first = queries(batches())
    assert len(first) == 12  # 100 examples, the last 4 fill no batch
    assert len({query for batch in first for query in batch}) == 96
    assert first == queries(batches())
    assert first != queries(batches(), 1)
    assert first != queries(batches(seed=2))
    assert queries(batches(), skip=5) == first[5:]
    in_order = queries(batches(buffer=0, bucket=1))
    assert in_order[0] == [str(i) for i in range(8)]


def test_skipped_batches_still_draw_their_negatives(numbered):
    batches = Batches([Source(numbered)], 8, negatives=2, buffer=30)
    whole = list(batches.epoch(0))
    assert list(batches.epoch(0, skip=7)) == whole[7:]
    assert all(len(example.negatives) == 2 for batch in whole for example in batch)


def test_buckets_hold_texts_of_similar_length(numbered):
    def spread(bucket):
        groups = Batches([Source(numbered)], 8, bucket=bucket).epoch(0)
        return np.mean([np.ptp([len(e.positives[0]) for e in group]) for group in groups])

    assert spread(12) < spread(1) / 3


def test_weights_repeat_examples(tmp_path):
    one = write(tmp_path / "1.tsv", *(f"a{i}\tp" for i in range(40)))
    two = write(tmp_path / "2.tsv", *(f"b{i}\tp" for i in range(40)))
    batches = Batches([Source(one), Source(two, weight=2.5)], 1)
    names = [query[0] for batch in queries(batches) for query in batch]
    assert names.count("a") == 40
    assert 85 < names.count("b") < 115


def test_ranks_share_a_batch(tmp_path):
    path = write(tmp_path / "s.jsonl", *({**SCORED, "query": f"q{i}"} for i in range(4)))
    (examples,) = Batches([Source(path)], 4, negatives=2, buffer=0, bucket=1).epoch(0)
    halves = [make_batch(share_of_rank(examples, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [half.queries for half in halves] == [["q0", "q1"], ["q2", "q3"]]
    assert halves[0].documents == ["p", "p", "n", "m", "n", "m"]
    np.testing.assert_array_equal(halves[1].scores, [[3, 2.5, -1]] * 2)
    with pytest.raises(ConfigError, match="multiple of the 3 ranks"):
        share_of_rank(examples, rank=0, world_size=3)


def test_scores_follow_their_negatives_and_may_be_missing(tmp_path):
    plain = {name: SCORED[name] for name in ("query", "positives", "negatives")}
    path = write(tmp_path / "s.jsonl", SCORED, plain)
    (examples,) = Batches([Source(path)], 2, negatives=1, buffer=0, bucket=1).epoch(0)
    scores = make_batch(examples).scores
    of_negative = {"n": 2.5, "m": -1.0}[examples[0].negatives[0]]
    assert scores[0].tolist() == [3.0, of_negative]
    assert all(math.isnan(score) for score in scores[1])


def test_too_little_data(tmp_path):
    path = write(tmp_path / "a.tsv", "q\tp")
    with pytest.raises(InputError, match="fewer than the 2 usable examples"):
        list(Batches([Source(path)], 2).epoch(0))
