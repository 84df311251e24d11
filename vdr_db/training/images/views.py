"""Images as an image body reads them: altered copies, and states of a frozen stem kept on disk.

A stem that is not trained gives the same states for an image in every epoch. They are computed
once, for the image and each of its altered copies, and read from memory-mapped files afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vdr_db.checkpoints.weights import digest
from vdr_db.errors import ConfigError, InputError, require
from vdr_db.images.preprocessing import Preprocessing
from vdr_db.images.reading import read_image
from vdr_db.towers.image_hybrid import HybridBody
from vdr_db.training.images.data import Pair

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PairImages", "StemStates", "alter"]

SHARD = 128
"""Images of one file of states: 8 MB at 25 patches."""
STEM_BATCH = 8
"""Images that go through the stem together; more are slower on a CPU, whose cache they leave."""
ALTERATION = 1
"""Counts up when `alter` changes, so that no states of the old one are taken."""


def alter(image: Image, rng: np.random.Generator) -> Image:
    """Another image of the same thing: moved, scaled, turned, recoloured.

    Args:
        image: In mode RGBA; what is transparent gets a background of some light colour, or white.
        rng: Draws everything.

    Returns:
        In mode RGB, of the same size.
    """
    module, enhance = require("PIL.Image", "images"), require("PIL.ImageEnhance", "images")
    colour = (255, 255, 255)
    if rng.random() < 0.5:
        red, green, blue = (int(part) for part in rng.integers(128, 256, 3))
        colour = (red, green, blue)
    width, height = image.size
    zoom, turn = rng.uniform(0.8, 1.25), np.deg2rad(rng.uniform(-15, 15))
    shift = rng.uniform(-0.1, 0.1, 2) * (width, height)
    cos, sin = np.cos(turn) / zoom, np.sin(turn) / zoom
    x, y = width / 2, height / 2
    # Pillow asks which place of the old image each place of the new one shows.
    right, down = x + shift[0], y + shift[1]
    places = (cos, sin, x - cos * right - sin * down, -sin, cos, y + sin * right - cos * down)
    moved = image.transform(
        image.size, module.Transform.AFFINE, places, resample=module.Resampling.BICUBIC
    )
    background = module.new("RGBA", image.size, (*colour, 255))
    background.alpha_composite(moved)
    result: Image = background.convert("RGB")
    for kind, spread in ((enhance.Color, 0.6), (enhance.Brightness, 0.2), (enhance.Contrast, 0.3)):
        result = kind(result).enhance(rng.uniform(1 - spread, 1 + spread))
    return result


class PairImages:
    """The images of some pairs, read from their files each time.

    Attributes:
        pairs: Whose images.
        preprocessing: How they become pixels.
        seed: Of the altered copies.
    """

    def __init__(self, pairs: Sequence[Pair], preprocessing: Preprocessing, *, seed: int) -> None:
        """Takes the pairs over."""
        self.pairs, self.preprocessing, self.seed = pairs, preprocessing, seed

    def take(self, numbers: Sequence[int], views: Sequence[int]) -> Tensor:
        """Input of a body for B pairs and which copy of each, 0 for the image itself.

        Returns:
            `[B, 3, S, S]` float32.

        Raises:
            InputError: An image cannot be read; the message names the line of its pair.
        """
        pixels = [self.pixels(*one) for one in zip(numbers, views, strict=True)]
        return torch.from_numpy(np.stack(pixels))

    def pixels(self, number: int, view: int) -> npt.NDArray[np.float32]:
        """One image or altered copy, `[3, S, S]`.

        Raises:
            InputError: It cannot be read.
        """
        pair = self.pairs[number]
        try:
            image = read_image(pair.image).image
        except InputError as error:
            raise InputError(f"{pair.source}: {error}") from error
        if view:
            image = alter(self._with_alpha(pair.image, image), self._rng(pair, view))
        return self.preprocessing.apply(image)

    def _with_alpha(self, path: Path, image: Image) -> Image:
        """The image with its transparency, where it has some and is stored upright."""
        module = require("PIL.Image", "images")
        with module.open(path) as stored:
            if stored.mode in ("RGBA", "LA", "P", "PA") and stored.size == image.size:
                return stored.convert("RGBA")  # type: ignore[no-any-return]
        return image.convert("RGBA")

    def _rng(self, pair: Pair, view: int) -> np.random.Generator:
        """By the name of the image, not its place: other pairs beside it change nothing."""
        name = int(hashlib.sha256(pair.image.name.encode()).hexdigest()[:16], 16)
        return np.random.default_rng([self.seed, view, name])


class StemStates(PairImages):
    """The same images as a frozen stem sees them, kept on disk as float16.

    Attributes:
        body: Whose stem.
        folder: Of the files, one for each `SHARD` images and view. Their names are digests of
            stem, images and options: what fits is taken, whatever run wrote it.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        preprocessing: Preprocessing,
        *,
        seed: int,
        body: HybridBody,
        folder: Path,
        views: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Computes what is not there yet, for each image and `views` altered copies of it.

        `progress` is called with files done and files in all.

        Raises:
            InputError: An image cannot be read; the message names the line of its pair.
            ConfigError: The folder cannot be written.
        """
        super().__init__(pairs, preprocessing, seed=seed)
        self.body, self.folder = body, folder
        self._stem = digest(dict(body.stem.named_parameters()))
        starts = range(0, len(pairs), SHARD)
        jobs = [(start, view) for start in starts for view in range(views + 1)]
        self._shards: dict[tuple[int, int], npt.NDArray[np.float16]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for done, (start, view) in enumerate(jobs, 1):
                self._shards[start, view] = self._shard(start, view)
                if progress is not None:
                    progress(done, len(jobs))
        except OSError as error:
            raise ConfigError(
                f"states of the stem cannot be kept in {folder}: {error}; set `image.cache` to a "
                "folder with room."
            ) from error

    def take(self, numbers: Sequence[int], views: Sequence[int]) -> Tensor:
        """Input of `HybridBody.contextualise`, `[B, P, C]` float32."""
        states = [
            self._shards[number - number % SHARD, view][number % SHARD]
            for number, view in zip(numbers, views, strict=True)
        ]
        return torch.from_numpy(np.stack(states)).float()

    def _shard(self, start: int, view: int) -> npt.NDArray[np.float16]:
        numbers = range(start, min(start + SHARD, len(self.pairs)))
        file = self.folder / f"{self._name(numbers, view)}.npy"
        if not file.is_file():
            fresh = self.folder / f".{file.name}.{os.getpid()}"
            with open(fresh, "wb") as stream:
                np.save(stream, self._computed(numbers, view))
            fresh.replace(file)
        return np.load(file, mmap_mode="r")  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _computed(self, numbers: range, view: int) -> npt.NDArray[np.float16]:
        device = self.body.position.device
        states = []
        for start in range(0, len(numbers), STEM_BATCH):
            some = numbers[start : start + STEM_BATCH]
            pixels = super().take(some, [view] * len(some))
            states.append(self.body.features(pixels.to(device)).half().cpu().numpy())
        return np.concatenate(states)

    def _name(self, numbers: range, view: int) -> str:
        options: dict[str, Any] = {
            "stem": self._stem,
            "preprocessing": self.preprocessing.to_dict(),
            "view": [view, self.seed, ALTERATION] if view else 0,
        }
        total = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
        for number in numbers:
            path = self.pairs[number].image
            total.update(hashlib.sha256(path.read_bytes()).digest())
            total.update(path.name.encode() if view else b"")
        return total.hexdigest()[:32]
