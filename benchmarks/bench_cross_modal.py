"""Text to image and image to text on pictograms: unseen vendor, unseen emoji, both, stamps.

    python benchmarks/bench_cross_modal.py MODEL PAIRS [--dense RUN] [--out FILE]

`MODEL` is a folder of a `CrossModalEncoder`, `PAIRS` what `scripts/make_pictogram_pairs.py` wrote,
`RUN` the output folder of a dense baseline. Each set is its own collection: N texts look for N
images and the other way, so chance is R@10 = 10 / N. Rows:

- `vdr`: V(text) . V(image), images with k words; the k of the model, and a sweep;
- `np`: BoW(text) . V(image), for which no model is run on the text; with own weights, these;
- `documents`: V(image) . V(text) with the text as a collection stores it, images looking for texts;
- `clip`: the dense baseline, same bodies, data and steps, one vector as wide as the texts' states;
- `cnn`: figures measured before with a frozen CNN and a small head, for comparison;
- `chance`.

Texts are names alone (`name`) or names with their keywords (`full`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from measure import Row, rows_of, write_csv

from vdr_db.encoders.cross_modal import CrossModalEncoder
from vdr_db.towers.image_hybrid import HybridBody
from vdr_db.training.images.data import Pair, read_pairs
from vdr_db.training.images.task import DENSE_FILE
from vdr_db.training.images.watch import CUTOFFS, recalls

SETS = ("unseen_vendor", "unseen_emoji", "unseen_both", "tuxpaint")
SWEEP = (32, 64, 128, 256, 512)
CNN = {"unseen_vendor": 0.55, "unseen_both": 0.41, "tuxpaint": 0.16}


def texts_of(pairs: list[Pair], kind: str) -> list[str]:
    """The first text of each pair, or the last."""
    return [pair.texts[0 if kind == "name" else -1] for pair in pairs]


def sparse_rows(encoder: CrossModalEncoder, name: str, pairs: list[Pair]) -> Iterator[Row]:
    """Rows of the sparse model on one set."""
    k = encoder.image.k
    encoder.image.k = max(SWEEP)
    encoded = encoder.encode_images([pair.image for pair in pairs])
    encoder.image.k = k
    if encoded.refused:
        raise SystemExit(f"images of {name} cannot be read: {dict(encoded.refused)}")
    for kind in ("name", "full"):
        texts = texts_of(pairs, kind)
        for model, queries in (
            ("vdr", encoder.encode_queries(texts)),
            ("np", encoder.bag_of_tokens(texts, "query")),
            ("documents", encoder.encode_documents(texts)),
        ):
            for kept in SWEEP:
                found = recalls(queries.dot(encoded.rows.topk(kept)))
                yield from rows(name, len(pairs), model, f"{kind} k={kept}", found)


def dense_rows(run: Path, name: str, pairs: list[Pair]) -> Iterator[Row]:
    """Rows of the dense baseline on one set."""
    encoder = CrossModalEncoder.from_pretrained(run / "model", device="cpu")
    maps = torch.load(run / DENSE_FILE, weights_only=True)
    right = dense_images(encoder, pairs, maps["image"], as_one_patch=bool(maps["as_one_patch"]))
    for kind in ("name", "full"):
        left = dense_texts(encoder, texts_of(pairs, kind), maps["text"])
        yield from rows(name, len(pairs), "clip", kind, recalls(left @ right.T))


@torch.inference_mode()
def dense_texts(
    encoder: CrossModalEncoder, texts: list[str], matrix: torch.Tensor
) -> npt.NDArray[np.float64]:
    """`[N, H]` unit vectors of texts."""
    from vdr_db.training.vectors import Side

    side = Side.of(encoder.text, "query", lexical=False)
    cls = side.encode(encoder.text.tokenizer.encode(texts), np.arange(len(texts)), {"cls"}).cls
    assert cls is not None
    return torch.nn.functional.normalize(cls @ matrix.T, dim=1).double().numpy()


@torch.inference_mode()
def dense_images(
    encoder: CrossModalEncoder, pairs: list[Pair], matrix: torch.Tensor, *, as_one_patch: bool
) -> npt.NDArray[np.float64]:
    """`[N, H]` unit vectors of images."""
    from vdr_db.training.images.views import PairImages

    images = PairImages(pairs, encoder.image.preprocessing, seed=0)
    tower = encoder.image.tower
    assert isinstance(tower.body, HybridBody)
    means = []
    for start in range(0, len(pairs), 8):
        numbers = range(start, min(start + 8, len(pairs)))
        features = tower.body.features(images.take(numbers, [0] * len(numbers)))
        if as_one_patch:
            features = features.mean(dim=1, keepdim=True)
        states = tower.head.norm(tower.body.contextualise(features))
        means.append(states.mean(dim=1))
    return torch.nn.functional.normalize(torch.cat(means) @ matrix.T, dim=1).double().numpy()


def rows(name: str, count: int, model: str, how: str, found: dict[str, float]) -> list[Row]:
    """One row for each recall; `how` is the kind of texts and the k of images."""
    samples = {key: [value] for key, value in found.items() if "_r@" in key}
    return rows_of("retrieve", model, f"{name} N={count} {how}".rstrip(), "float32", samples)


def known_rows(name: str, count: int) -> Iterator[Row]:
    """Chance, and what a CNN with a small head reached."""
    chance = {
        f"{way}_r@{cutoff}": cutoff / count
        for way in ("text_to_image", "image_to_text")
        for cutoff in CUTOFFS
    }
    yield from rows(name, count, "chance", "", chance)
    if name in CNN:
        yield from rows(name, count, "cnn", "", {"text_to_image_r@10": CNN[name]})


def main() -> None:
    """Measure every set, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="folder of a CrossModalEncoder")
    parser.add_argument("pairs", type=Path, help="folder of make_pictogram_pairs.py")
    parser.add_argument("--dense", type=Path, help="output folder of the dense baseline")
    parser.add_argument("--out", type=Path, help="CSV file")
    arguments = parser.parse_args()

    encoder = CrossModalEncoder.from_pretrained(arguments.model, device="cpu")
    measured: list[Row] = []
    for name in SETS:
        file = arguments.pairs / f"{name}.jsonl"
        if not file.is_file():
            continue
        pairs = read_pairs(file)
        made = [*known_rows(name, len(pairs)), *sparse_rows(encoder, name, pairs)]
        if arguments.dense:
            made += dense_rows(arguments.dense, name, pairs)
        for one in made:
            print(one.backend, one.shape, one.metric, one.median)
        measured += made
    if arguments.out:
        write_csv(arguments.out, measured)


if __name__ == "__main__":
    main()
