"""Images beside frozen texts with own weights: what they look for, and rows of their own."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from vdr_db import CrossModalEncoder
from vdr_db.checkpoints.assets import fetch
from vdr_db.training.image_settings import ImageConfig
from vdr_db.training.images.data import Pair
from vdr_db.training.images.vectors import KEPT, KeptRows, TextSide, kept_columns
from vdr_db.training.images.watch import recalls

NAMES = [f"{colour} {thing}" for colour in ("red", "blue", "green") for thing in ("cat", "boat")]


@pytest.fixture(scope="module")
def encoder():
    return CrossModalEncoder.from_pretrained(fetch("vdr-mini"), device="cpu", runtime="torch")


def dense(rows):
    found = np.zeros((len(rows), rows.width), np.float32)
    bounds = rows.indptr.tolist()
    for place, (start, end) in enumerate(pairwise(bounds)):
        found[place, rows.columns[start:end]] = rows.weights[start:end]
    return found


def test_texts_are_as_they_are_searched_and_stored(encoder):
    text, size = encoder.text, encoder.vocabulary.columns
    found = TextSide(encoder, ImageConfig()).encode(NAMES, {"gated", "bags"})
    for rows, encode in ((found.gated, text.encode_queries), (found.bags, text.encode_documents)):
        for row, one in zip(dense(rows), encode(NAMES), strict=True):
            wanted = np.zeros(size, np.float32)
            wanted[encoder.vocabulary.columns_of(one.indices)] = one.values
            np.testing.assert_allclose(row, wanted / np.linalg.norm(wanted), rtol=1e-5)


def test_words_that_ten_vectors_keep_get_rows(encoder):
    pairs = [Pair(Path("image.png"), (name,), "line") for name in NAMES]
    counts = {}
    for encode in (encoder.text.encode_queries, encoder.text.encode_documents):
        for row in encode(NAMES):
            for id in row.indices.tolist():
                counts[id] = counts.get(id, 0) + 1
    wanted = sorted(
        int(encoder.vocabulary.id_to_column[id]) for id, count in counts.items() if count >= KEPT
    )
    assert wanted
    assert len(wanted) < len(counts)
    side = TextSide(encoder, ImageConfig())
    assert kept_columns(side, pairs * 2).tolist() == wanted  # a text counts once


def test_only_kept_rows_are_trained():
    projection = torch.randn(6, 3)
    before = projection.clone()
    kept = KeptRows(projection, torch.tensor([1, 4]))
    weights = torch.randn(6, 3)
    for columns in (None, torch.tensor([0, 4, 5])):
        kept.rows.grad = None
        found = kept.of(columns)
        chosen = slice(None) if columns is None else columns
        torch.testing.assert_close(found, before[chosen], rtol=0, atol=0)
        (found * weights[chosen]).sum().backward()
        wanted = torch.zeros(6, 3)
        wanted[chosen] = weights[chosen]
        torch.testing.assert_close(kept.rows.grad, wanted[[1, 4]], rtol=0, atol=0)
    with torch.no_grad():
        kept.rows += 1
    torch.testing.assert_close(projection, before, rtol=0, atol=0)
    kept.settle()
    before[[1, 4]] += 1
    torch.testing.assert_close(projection, before, rtol=0, atol=0)


def test_images_look_for_texts_as_they_are_stored():
    queries, documents = np.eye(20) + 1, np.eye(20)[::-1] + 1
    found = recalls(queries, documents)
    assert found["text_to_image_r@1"] == 1
    assert found["image_to_text_r@1"] == 0
