"""Pairs of images and texts: files, and batches of them.

A file of pairs is JSONL, gzipped or not; other keys are left alone:

    {"image": "images/1.png", "text": "a cat"}
    {"image": "images/2.png", "text": ["a dog", "a dog, pet, animal"]}

Paths are relative to the file. Of several texts, one is drawn each time. The order of examples is a
function of files, seed and epoch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vdr_db.errors import ConfigError, InputError
from vdr_db.readers import json_rows

__all__ = ["ImageExample", "Pair", "PairBatches", "read_pairs"]


@dataclass(frozen=True)
class Pair:
    """An image and its texts.

    Attributes:
        image: Path of the image, which exists.
        texts: At least one, none empty.
        source: `FILE:LINE`.
    """

    image: Path
    texts: tuple[str, ...]
    source: str = ""


@dataclass(frozen=True)
class ImageExample:
    """What a pair contributes to a batch.

    Attributes:
        number: Of the pair, over all files.
        text: One of its texts.
        view: Which copy of the image; 0 is the image itself.
    """

    number: int
    text: str
    view: int


def read_pairs(path: Path, *, on_bad: Callable[[InputError], None] | None = None) -> list[Pair]:
    """All pairs of a `.jsonl` or `.jsonl.gz`, in its order.

    Args:
        path: The file.
        on_bad: Called with the error of each bad line, which is then left out; None raises it.

    Raises:
        InputError: The file cannot be read or a line is bad; the message names file and line.
    """
    pairs = []
    for row, where in json_rows(path):
        try:
            if isinstance(row, InputError):
                raise row
            pairs.append(_parse(row, where, path.parent))
        except InputError as error:
            if on_bad is None:
                raise
            on_bad(error)
    return pairs


def _parse(row: dict[str, Any], where: str, folder: Path) -> Pair:
    image, text = row.get("image"), row.get("text")
    if not isinstance(image, str) or not image:
        raise InputError(f"{where}: `image` must be the path of an image, got {image!r}.")
    texts: Any = [text] if isinstance(text, str) else text
    good = (
        isinstance(texts, list) and texts and all(isinstance(t, str) and t.strip() for t in texts)
    )
    if not good:
        raise InputError(
            f"{where}: `text` must be a text or a list of texts, none empty, got {text!r}."
        )
    if not (folder / image).is_file():
        raise InputError(
            f"{where}: the image {image} must lie in or below {folder}, but is not there; "
            "paths are relative to the file of pairs."
        )
    return Pair(folder / image, tuple(texts), where)


@dataclass
class PairBatches:
    """Global batches of several files, epoch after epoch.

    No two pairs of a batch have the same first text: each would be a false negative of the other.

    Attributes:
        files: Files of pairs, and how often each pair of it comes in an epoch.
        batch_size: Pairs of a global batch, over all ranks.
        seed: Of shuffling and drawing.
        views: Altered copies of each image.
        on_bad: `"raise"` on a bad line, or `"skip"` and count it.
        skipped: How many bad lines were left out.
        pairs: All pairs.
    """

    files: Sequence[tuple[Path, float]]
    batch_size: int
    seed: int = 0
    views: int = 0
    on_bad: Literal["raise", "skip"] = "raise"
    skipped: int = field(default=0, init=False)
    pairs: list[Pair] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Reads the files.

        Raises:
            InputError: A bad line with `on_bad="raise"`, or fewer pairs than one batch.
            ConfigError: A weight is not above 0.
        """
        self._weights: list[float] = []
        skipped: list[InputError] = []
        for path, weight in self.files:
            if not weight > 0:
                raise ConfigError(f"the `weight` of {path} must be above 0, got {weight}.")
            read = read_pairs(path, on_bad=skipped.append if self.on_bad == "skip" else None)
            self.pairs += read
            self._weights += [weight] * len(read)
        self.skipped = len(skipped)
        if len({_key(pair) for pair in self.pairs}) < self.batch_size:
            names = ", ".join(str(path) for path, _ in self.files)
            raise InputError(
                f"{names}: fewer than the {self.batch_size} pairs with different texts of one "
                f"batch ({self.skipped} skipped); lower `batch_size` or give more data."
            )

    def epoch(self, number: int, *, skip: int = 0) -> Iterator[list[ImageExample]]:
        """Full batches of one epoch, without the first `skip` and what does not fill a batch."""
        rng = np.random.default_rng([self.seed, number])
        times = [math.floor(w) + int(rng.random() < w % 1.0) for w in self._weights]
        order = rng.permutation(np.repeat(np.arange(len(self.pairs)), times))
        texts, views = rng.random(len(order)), rng.integers(self.views + 1, size=len(order))
        made = 0
        waiting: list[int] = []  # places in `order`
        batch: dict[str, int] = {}
        for place in range(len(order)):
            waiting.append(place)
            for early in list(waiting):
                key = _key(self.pairs[order[early]])
                if key not in batch and len(batch) < self.batch_size:
                    batch[key] = early
                    waiting.remove(early)
            if len(batch) < self.batch_size:
                continue
            made += 1
            if made > skip:
                chosen = [(int(order[p]), texts[p], int(views[p])) for p in batch.values()]
                yield [self._example(*one) for one in chosen]
            batch = {}

    def _example(self, number: int, drawn: float, view: int) -> ImageExample:
        texts = self.pairs[number].texts
        return ImageExample(number, texts[int(drawn * len(texts))], view)


def _key(pair: Pair) -> str:
    return pair.texts[0].lower()
