"""Queries of tokens alone: the bags that the model makes, without the model and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vdr_db import TokenQueries
from vdr_db.cli.main import main
from vdr_db.connectors import VDRQdrant
from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import StoreMismatch

NOTES = Path(__file__).parent / "data" / "notes.jsonl"
TEXTS = ["Green tea, please!", "", "a tall beast " * 300, "Naïve café"]


def test_bags_are_those_of_the_model():
    # One of its own, as an encoder warns of cut texts once.
    vdr_mini = SparseEncoder.from_pretrained("vdr-mini", device="cpu")
    queries = TokenQueries.from_pretrained("vdr-mini")
    with pytest.warns(UserWarning, match="longer than"):
        expected = vdr_mini.bag_of_tokens(TEXTS, side="query")
    assert queries.bag_of_tokens(TEXTS) == expected
    assert queries.truncated == 1
    assert queries.encode_queries(TEXTS) == expected
    assert queries.token_ids("tea") == vdr_mini.token_ids("tea")
    assert queries.stamp().difference(vdr_mini.stamp()) == []


def test_a_collection_is_searched_by_them(vdr_mini, tiny_splade_folder):
    queries = TokenQueries.from_pretrained("vdr-mini")
    with VDRQdrant("a", vdr_mini, path=":memory:") as notes:
        notes.add_texts(["green tea", "tall giraffes"], ids=["tea", "zoo"])
        expected = notes.search("tea", mode="alpha")
        notes._encoding = type(notes._encoding)(queries)
        assert notes.search("tea", mode="alpha") == expected
        assert notes.explain("tea", "tea", mode="alpha")[0].token == "tea"
    other = TokenQueries.from_pretrained(tiny_splade_folder)
    with VDRQdrant("a", vdr_mini, path=":memory:") as notes:
        notes.add_texts(["green tea"])
        notes._encoding = type(notes._encoding)(other)
        with pytest.raises(StoreMismatch, match="vocabulary kind"):
            notes._check_fit()


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers"):
    sys.modules[name] = None
from vdr_db.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_commands_need_no_torch(tmp_path):
    store = tmp_path / "s"
    assert main(["index", str(NOTES), "--store", str(store)]) == 0
    words = ["search", "hot water", "--store", str(store), "--mode", "alpha", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    best = json.loads(done.stdout)["hits"][0]
    assert best["id"] == "tea"
    assert {word for word, _ in best["words"]} == {"hot", "water"}
