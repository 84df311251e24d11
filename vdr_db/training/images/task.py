"""Training on texts and images together.

pairs -> V(text), BoW(text), V(image) -> symmetric InfoNCE over all ranks -> gradients
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vdr_db.errors import ConfigError, InputError
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
from vdr_db.training.images.vectors import DenseHeads, ImageSide, TextSide
from vdr_db.training.images.views import PairImages, StemStates
from vdr_db.training.images.watch import HeldOutPairs
from vdr_db.training.models import DTYPES, MODEL_FOLDER, set_dropout
from vdr_db.training.objective import Objective
from vdr_db.training.settings import LossConfig, TrainConfig
from vdr_db.training.task import Task

__all__ = ["DENSE_FILE", "ImageBatch", "ImageTask", "feature_distance"]

STATES_FOLDER = "features"
DENSE_FILE = "dense.pt"
DENSE_TEMPERATURE = 0.05
"""Of dense vectors beside sparse ones."""
SAMPLE = 1024
"""Images that the statistics of the stem's channels are taken from: the first ones."""


@dataclass(frozen=True)
class ImageBatch:
    """A rank's share of a batch.

    Attributes:
        texts: N texts.
        inputs: `[N, ...]`, their images as the image side takes them.
        features: `[N, F]`, the teacher's features of the images, or None.
    """

    texts: list[str]
    inputs: Tensor
    features: Tensor | None


def feature_distance(features: Tensor, teacher: Tensor) -> Tensor:
    """One less the mean cosine between a student's and a teacher's features.

        L = 1 - mean_b (s_b . t_b) / (|s_b| |t_b|)

    Args:
        features: `[B, F]`, float.
        teacher: `[B, F]`, float.

    Source: after Romero et al. 2015 (FitNets), https://arxiv.org/abs/1412.6550, with the cosine for
    the squared distance, so that the scale of the features does not matter.
    """
    return 1 - torch.cosine_similarity(features, teacher, dim=1).mean()


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
            ConfigError: There is no section `image`, or the formulas do not allow the objective.
        """
        if config.image is None:
            raise ConfigError("training on images needs a section `image`, got none; add it.")
        self.config, self.image, self._on_states = config, config.image, on_states
        self.objective = Objective(config.loss)
        self._needs = self.objective.query_needs()
        self._beside: Objective | None = None
        if self.image.dense_weight:
            self._beside = Objective(
                LossConfig(
                    objective="dpr",
                    temperature=DENSE_TEMPERATURE,
                    symmetry=config.loss.symmetry,
                )
            )
            self._needs |= self._beside.query_needs()

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
        self._features = self._teacher_features(len(self.data.pairs))
        self._make_sides(device)
        self._held_out = None
        if self.is_measured:
            pairs = read_pairs(Path(config.evaluation.folder))
            pairs = pairs[: config.evaluation.queries or None]
            self._held_out = HeldOutPairs(pairs, self._images_of(pairs, views=0))

    def _make_sides(self, device: torch.device) -> None:
        """Both sides, and what only training puts on them."""
        config, image = self.config, self.image
        width = self.encoder.image.tower.body.hidden_size
        dense = None
        is_dense = config.loss.objective == "dpr"
        if image.dense_weight or (is_dense and image.dense == "heads"):
            text_width = self.encoder.text.document_tower.body.config.hidden_size
            dense = DenseHeads(text_width, width, seed=config.run.seed).to(device)
            if image.dense_start:
                dense.load(Path(image.dense_start))
            self.parameters |= {f"dense.{name}": p for name, p in dense.named_parameters()}
        self._mimic: nn.Parameter | None = None
        if self._features is not None:
            zeros = torch.zeros(self._features.shape[1], width, device=device)
            generator = torch.Generator().manual_seed(config.run.seed)
            drawn = torch.randn(zeros.shape, generator=generator) * width**-0.5
            self._mimic = nn.Parameter(zeros + drawn.to(device))
            self.parameters["mimic"] = self._mimic
        self.texts = TextSide(
            self.encoder,
            is_frozen=not image.train_text,
            dense=dense,
            unit_sample=image.sampled_columns,
        )
        self.side = ImageSide(
            self.encoder,
            dropout=image.dropout,
            patch_dropout=image.patch_dropout,
            dense=dense,
            is_sparse=not is_dense,
            by_matrix=is_dense and image.dense == "matrix",
            as_one_patch=image.as_one_patch,
            centre=self._centred(device) if has_stem_states(self.encoder) else None,
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
        preprocessing = self.encoder.image.preprocessing
        body = self.encoder.image.tower.body
        seed = self.config.run.seed
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

    def _teacher_features(self, pairs: int) -> npt.NDArray[np.float32] | None:
        file = self.image.teacher
        if not file:
            return None
        try:
            features: npt.NDArray[np.float32] = np.load(file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file} must be a .npy file with the teacher's features: {error}."
            ) from error
        if features.ndim != 2 or len(features) != pairs:
            raise InputError(
                f"{file} must hold a row of features for each of the {pairs} training pairs, got "
                f"an array of shape {list(features.shape)}."
            )
        return features

    def state(self) -> dict[str, Tensor]:
        """What is trained; the rest is as it was loaded."""
        return {name: parameter.data for name, parameter in self.parameters.items()}

    def batch(self, examples: Sequence[ImageExample]) -> ImageBatch:
        """Texts, their images read, and the teacher's features of these."""
        numbers = [example.number for example in examples]
        features = None
        if self._features is not None:
            features = torch.from_numpy(np.array(self._features[numbers], np.float32))
        inputs = self._images.take(numbers, [example.view for example in examples])
        return ImageBatch([example.text for example in examples], inputs, features)

    def learn(
        self, batch: ImageBatch, scaler: torch.amp.GradScaler, *, regulariser: float, share: float
    ) -> dict[str, float]:
        """Adds the gradient of one batch."""
        device, precision = self.encoder.image.device, self.config.run.precision
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32"):
            texts = self.texts.encode(batch.texts, self._needs)
            sample = None
            if self.image.sampled_columns and texts.gated is not None:
                texts, sample = sample_columns(texts, self.image.sampled_columns)
            images, means = self.side.encode(batch.inputs, sample)
        loss, parts = self.objective(texts, images, regulariser=regulariser)
        if self._beside is not None:
            dense, of_dense = self._beside(texts, images)
            loss = loss + self.image.dense_weight * dense
            parts["dense"] = of_dense["loss"]
        if self._mimic is not None and batch.features is not None:
            distance = feature_distance(means @ self._mimic.T, batch.features.to(device))
            loss = loss + distance
            parts["teacher"] = float(distance.detach())
        parts["loss"] = float(loss.detach())
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
        if self.config.loss.objective == "dpr":
            return self._held_out.measure_dense(self.texts, self.side)
        return self._held_out.measure(self.encoder, self.side)

    def save(self, output: Path) -> None:
        """Writes both encoders, and the maps of dense vectors where there are some."""
        save_pair(self.encoder, output / MODEL_FOLDER, DTYPES[self.config.model.save_dtype])
        if self.texts.dense is not None:
            dense = {name: p.detach() for name, p in self.texts.dense.named_parameters()}
            one = torch.tensor(self.image.as_one_patch)
            torch.save({**dense, "as_one_patch": one}, output / DENSE_FILE)
