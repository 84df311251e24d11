"""Training on texts and images together.

pairs -> V(text), BoW(text), V(image) -> symmetric InfoNCE over all ranks -> gradients
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vdr_db.errors import ConfigError
from vdr_db.towers.image_hybrid import HybridBody
from vdr_db.training.images.columns import sample_columns
from vdr_db.training.images.data import ImageExample, Pair, PairBatches, read_pairs
from vdr_db.training.images.models import (
    channel_statistics,
    has_stem_states,
    load_pair,
    save_pair,
    standardise,
    trainable_pair,
)
from vdr_db.training.images.vectors import (
    DenseHeads,
    ImageSide,
    KeptRows,
    TextSide,
    kept_columns,
)
from vdr_db.training.images.views import PairImages, StemStates
from vdr_db.training.images.watch import HeldOutPairs
from vdr_db.training.models import DTYPES, MODEL_FOLDER, set_dropout
from vdr_db.training.objective import Objective
from vdr_db.training.settings import TrainConfig
from vdr_db.training.task import Task

__all__ = ["DENSE_FILE", "ImageBatch", "ImageTask"]

STATES_FOLDER = "features"
DENSE_FILE = "dense.pt"
SAMPLE = 1024
"""Images that the statistics of the stem's channels are taken from: the first ones."""


@dataclass(frozen=True)
class ImageBatch:
    """A rank's share of a batch.

    Attributes:
        texts: N texts.
        inputs: `[N, ...]`, their images as the image side takes them.
    """

    texts: list[str]
    inputs: Tensor


class ImageTask(Task[ImageExample, ImageBatch]):
    """Pairs of texts and images; see `Task`.

    Attributes:
        config: All settings.
        encoder: What is trained, after `load`.
    """

    def __init__(
        self, config: TrainConfig, *, on_states: Callable[[int, int], None] | None = None
    ) -> None:
        """Takes the settings.

        Args:
            config: All settings.
            on_states: Called with files of stem states done and in all, while they are computed.

        Raises:
            ConfigError: There is no section `image`.
        """
        if config.image is None:
            raise ConfigError("training on images needs a section `image`, got none; add it.")
        self.config, self.image, self._on_states = config, config.image, on_states
        self.objective = Objective(config.loss)

    def load(self, output: Path, device: torch.device) -> None:
        """Loads both encoders, states of images and the held-out part."""
        config, image = self.config, self.image
        self._states_folder = Path(image.cache) if image.cache else output / STATES_FOLDER
        self.data = PairBatches(
            [(Path(item.path), item.weight) for item in config.data.train],
            config.run.batch_size,
            seed=config.run.seed,
            views=image.views,
            on_bad=config.data.on_bad,
        )
        self.encoder = load_pair(config, image, device)
        set_dropout(self.encoder.text, config.run.dropout)
        self.parameters = trainable_pair(self.encoder, config, image)
        self._images = self._images_of(self.data.pairs, views=image.views)
        self._make_sides(device)
        self._held_out = None
        if self.is_measured:
            pairs = read_pairs(Path(config.evaluation.folder))
            pairs = pairs[: config.evaluation.queries or None]
            self._held_out = HeldOutPairs(pairs, self._images_of(pairs, views=0))

    def _make_sides(self, device: torch.device) -> None:
        """Both sides, and what only training puts on them."""
        encoder, image = self.encoder, self.image
        dense = None
        is_dense = self.config.loss.objective == "dpr"
        if is_dense and image.dense == "heads":
            text_width = encoder.text.document_tower.body.config.hidden_size
            image_width = encoder.image.tower.body.hidden_size
            dense = DenseHeads(text_width, image_width, seed=self.config.run.seed).to(device)
            self.parameters |= {f"dense.{name}": p for name, p in dense.named_parameters()}
        self.texts = TextSide(encoder, image, dense)
        centre = self._centred(device) if has_stem_states(encoder) else None
        kept = None
        if image.projection == "kept" and not is_dense:
            columns = kept_columns(self.texts, self.data.pairs)
            kept = KeptRows(encoder.image.tower.head.projection, columns)
            self.parameters["image.kept.word.weight"] = kept.rows  # learns as embeddings do
        self.side = ImageSide(
            encoder, image, dense=dense, is_sparse=not is_dense, centre=centre, kept=kept
        )

    def _centred(self, device: torch.device) -> Tensor:
        """Mean of the stem's channels, `[C]`; a new body is made to see them standardised."""
        numbers = range(min(SAMPLE, len(self.data.pairs)))
        states = self._images.take(numbers, [0] * len(numbers)).to(device)
        mean, deviation = channel_statistics(states)
        body = self.encoder.image.tower.body
        if isinstance(body, HybridBody) and not self.image.start:
            standardise(body, mean, deviation)
        return mean

    def _images_of(self, pairs: Sequence[Pair], *, views: int) -> PairImages:
        preprocessing, seed = self.encoder.image.preprocessing, self.config.run.seed
        body = self.encoder.image.tower.body
        if not isinstance(body, HybridBody):
            return PairImages(pairs, preprocessing, seed=seed)
        return StemStates(
            pairs,
            preprocessing,
            seed=seed,
            body=body,
            folder=self._states_folder,
            views=views,
            progress=self._on_states,
        )

    def state(self) -> dict[str, Tensor]:
        """What is trained; the rest is as it was loaded."""
        return {name: parameter.data for name, parameter in self.parameters.items()}

    def batch(self, examples: Sequence[ImageExample]) -> ImageBatch:
        """Texts, and their images read."""
        inputs = self._images.take([one.number for one in examples], [one.view for one in examples])
        return ImageBatch([one.text for one in examples], inputs)

    def learn(
        self, batch: ImageBatch, scaler: torch.amp.GradScaler, *, regulariser: float, share: float
    ) -> dict[str, float]:
        """Adds the gradient of one batch."""
        device, precision = self.encoder.image.device, self.config.run.precision
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32"):
            texts = self.texts.encode(batch.texts, self.objective.query_needs())
            sample = None
            if self.image.sampled_columns and texts.gated is not None:
                texts, sample = sample_columns(texts, self.image.sampled_columns)
            images = self.side.encode(batch.inputs, sample)
        loss, parts = self.objective(texts, images, regulariser=regulariser)
        scaler.scale(loss * share).backward()
        return parts

    def set_training(self, mode: bool) -> None:
        """Turns dropout on or off; a frozen text side stays as it is."""
        self.encoder.image.tower.train(mode)
        self.encoder.text.document_tower.train(mode and self.image.train_text)

    def measure(self) -> dict[str, float]:
        """Recalls of texts and images looking for each other, and nDCG@10."""
        if self._held_out is None:
            return {}
        self._settle()
        if self.config.loss.objective == "dpr":
            return self._held_out.measure_dense(self.texts, self.side)
        return self._held_out.measure(self.encoder, self.side)

    def save(self, output: Path) -> None:
        """Writes both encoders, and the maps of dense vectors where there are some."""
        self._settle()
        save_pair(self.encoder, output / MODEL_FOLDER, DTYPES[self.config.model.save_dtype])
        if self.texts.dense is not None:
            dense = {name: p.detach() for name, p in self.texts.dense.named_parameters()}
            one = torch.tensor(self.image.as_one_patch)
            torch.save({**dense, "as_one_patch": one}, output / DENSE_FILE)

    def _settle(self) -> None:
        """Puts what is trained beside the encoders into them."""
        if self.side.kept is not None:
            self.side.kept.settle()
