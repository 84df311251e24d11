"""Cross-modal training: the loop of `Trainer` on pairs of pictures and texts.

    pairs -> V(text), BoW(text), V(picture) -> symmetric InfoNCE over all ranks -> gradients -> ...

What differs from texts alone is here: which encoders are trained, what a batch is, how it becomes
vectors, and what is measured. The loop, its checkpoints and its log are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vdr_db.encoders.cross_modal import CrossModalEncoder
from vdr_db.errors import ConfigError, InputError
from vdr_db.towers.image_hybrid import HybridBody
from vdr_db.training.distributed import rank, world_size
from vdr_db.training.images.columns import sample_columns
from vdr_db.training.images.data import Pair, PairBatches, PictureExample, read_pairs
from vdr_db.training.images.models import (
    channel_statistics,
    has_stem_states,
    load_pair,
    save_pair,
    standardise,
    trainable_pair,
)
from vdr_db.training.images.settings import CrossModalConfig
from vdr_db.training.images.vectors import DenseHeads, PictureSide, TextSide
from vdr_db.training.images.views import Pictures, StemStates
from vdr_db.training.images.watch import HeldOutPairs
from vdr_db.training.learner import DTYPES
from vdr_db.training.models import set_dropout
from vdr_db.training.objective import Objective
from vdr_db.training.schedule import make_optimiser
from vdr_db.training.settings import LossConfig
from vdr_db.training.trainer import MODEL_FOLDER, Trainer

__all__ = ["DENSE_FILE", "CrossModalTrainer", "PictureBatch", "PictureLearner", "feature_distance"]

STATES_FOLDER = "features"
DENSE_FILE = "dense.pt"
SAMPLE = 1024
"""Pictures that the statistics of the stem's channels are taken from: the first ones."""


@dataclass(frozen=True)
class PictureBatch:
    """A rank's share of a batch, and its place in the data.

    Attributes:
        texts: N texts.
        inputs: `[N, ...]`, their pictures as the image side takes them.
        features: `[N, F]`, the teacher's features of the pictures, or None.
        epoch: Of the data.
        number: Of the global batch within it, from 1.
    """

    texts: list[str]
    inputs: Tensor
    features: Tensor | None
    epoch: int
    number: int


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


class PictureLearner:
    """Adds a batch's gradient to the parameters of both encoders."""

    def __init__(
        self,
        sides: tuple[TextSide, PictureSide],
        objective: Objective,
        settings: CrossModalConfig,
        scaler: torch.amp.GradScaler,
        mimic: nn.Parameter | None,
    ) -> None:
        """Puts the parts together.

        Args:
            sides: Texts and pictures.
            objective: What is minimised.
            settings: Precision and the teacher's weight count.
            scaler: Of the loss in float16.
            mimic: `[F, H]`, from mean states of patches to the teacher's features.
        """
        self.texts, self.pictures = sides
        self.objective, self.settings = objective, settings
        self.scaler, self.mimic = scaler, mimic
        self.needs = objective.query_needs()
        self.beside: Objective | None = None
        if settings.image.dense_weight:
            self.beside = Objective(
                LossConfig(
                    objective="dpr",
                    temperature=settings.image.dense_temperature,
                    symmetry=settings.loss.symmetry,
                )
            )
            self.needs |= self.beside.query_needs()

    def learn(self, batch: PictureBatch, *, regulariser: float, share: float) -> dict[str, float]:
        """Adds the gradient of one batch.

        Args:
            batch: Texts and pictures.
            regulariser: Factor of FLOPS and L1, in 0..1.
            share: Of this batch in the step's loss.

        Returns:
            Parts of its loss by name.
        """
        device = self.pictures.encoder.device
        precision = self.settings.run.precision
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32"):
            texts = self.texts.encode(batch.texts, self.needs)
            sample = None
            if self.settings.image.sampled_columns and texts.gated is not None:
                texts, sample = sample_columns(texts, self.settings.image.sampled_columns)
            pictures, means = self.pictures.encode(batch.inputs, sample)
        loss, parts = self.objective(texts, pictures, regulariser=regulariser)
        if self.beside is not None:
            dense, of_dense = self.beside(texts, pictures)
            loss = loss + self.settings.image.dense_weight * dense
            parts["dense"] = of_dense["loss"]
        if self.mimic is not None and batch.features is not None:
            distance = feature_distance(means @ self.mimic.T, batch.features.to(device))
            loss = loss + self.settings.image.teacher_weight * distance
            parts["teacher"] = float(distance.detach())
        parts["loss"] = float(loss.detach())
        self.scaler.scale(loss * share).backward()
        return parts


class CrossModalTrainer(Trainer):
    """One cross-modal run: a configuration, an output folder, a device."""

    config: CrossModalConfig
    batches: Any  # of pictures: same use as in `Trainer`, other types
    learner: Any
    held_out: Any

    def __init__(
        self, config: CrossModalConfig, output: Path, *, device: torch.device | None = None
    ) -> None:
        """Checks what can be checked before anything is loaded; see `Trainer`."""
        super().__init__(config, output, device=device)
        self.on_states: Callable[[int, int], None] | None = None
        """Called with files of stem states done and in all, while they are computed."""

    def _load(self) -> None:
        config, image = self.config, self.config.image
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        if config.run.batch_size % world_size():
            raise ConfigError(
                f"`run.batch_size` must be a multiple of the {world_size()} ranks, got "
                f"{config.run.batch_size}."
            )
        self.batches = PairBatches(
            [(Path(item.path), item.weight) for item in config.data.train],
            config.run.batch_size,
            seed=config.run.seed,
            views=image.views,
            on_bad=config.data.on_bad,
        )
        self.both = load_pair(config, self.device)
        self.encoder = self.both.text
        set_dropout(self.encoder, config.run.dropout)
        self.parameters = trainable_pair(self.both, config)
        self.pictures = self._pictures(self.batches.pairs, views=image.views)
        self.features = self._teacher_features(len(self.batches.pairs))
        self._make_sides()
        self.optimiser = make_optimiser(self.parameters.items(), config.optimiser)
        is_scaled = config.run.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_scaled)
        self.held_out = None
        if config.evaluation.folder:
            pairs = read_pairs(Path(config.evaluation.folder))
            pairs = pairs[: config.evaluation.queries or None]
            self.held_out = HeldOutPairs(pairs, self._pictures(pairs, views=0))
        self.learner = PictureLearner(
            (self.texts, self.side), self.objective, config, self.scaler, self.mimic
        )

    def _make_sides(self) -> None:
        """Both sides, and what only training puts on them."""
        config, image = self.config, self.config.image
        width = self.both.image.tower.body.hidden_size
        dense = None
        is_dense = config.loss.objective == "dpr"
        if image.dense_weight or (is_dense and image.dense == "heads"):
            text_width = self.encoder.document_tower.body.config.hidden_size
            dense = DenseHeads(text_width, width, seed=config.run.seed).to(self.device)
            if image.dense_start:
                dense.load(Path(image.dense_start))
            self.parameters |= {f"dense.{name}": p for name, p in dense.named_parameters()}
        self.mimic: nn.Parameter | None = None
        if self.features is not None:
            zeros = torch.zeros(self.features.shape[1], width, device=self.device)
            generator = torch.Generator().manual_seed(config.run.seed)
            drawn = torch.randn(zeros.shape, generator=generator) * width**-0.5
            self.mimic = nn.Parameter(zeros + drawn.to(self.device))
            self.parameters["mimic"] = self.mimic
        has_states = has_stem_states(self.both, image)
        centre = self._centred() if has_states else None
        self.texts = TextSide(
            self.both,
            is_frozen=not image.train_text,
            dense=dense,
            unit_sample=image.sampled_columns,
        )
        self.side = PictureSide(
            self.both,
            has_stem_states=has_states,
            dropout=image.dropout,
            patch_dropout=image.patch_dropout,
            dense=dense,
            is_sparse=not is_dense,
            by_matrix=is_dense and image.dense == "matrix",
            as_one_patch=image.as_one_patch,
            centre=centre,
        )

    def _centred(self) -> Tensor:
        """Mean of the stem's channels, `[C]`; a new body is made to see them standardised."""
        numbers = range(min(SAMPLE, len(self.batches.pairs)))
        states = self.pictures.take(numbers, [0] * len(numbers)).to(self.device)
        mean, deviation = channel_statistics(states)
        body = self.both.image.tower.body
        if isinstance(body, HybridBody) and not self.config.image.start:
            standardise(body, mean, deviation)
        return mean

    def _pictures(self, pairs: Sequence[Pair], *, views: int) -> Pictures:
        image = self.config.image
        preprocessing = self.both.image.preprocessing
        body = self.both.image.tower.body
        if not has_stem_states(self.both, image):
            return Pictures(pairs, preprocessing, seed=self.config.run.seed)
        return StemStates(
            pairs,
            preprocessing,
            seed=self.config.run.seed,
            body=body,  # type: ignore[arg-type] # `has_stem_states` says that it is a hybrid
            folder=Path(image.cache) if image.cache else self.output / STATES_FOLDER,
            views=views,
            progress=self.on_states,
        )

    def _teacher_features(self, pairs: int) -> npt.NDArray[np.float32] | None:
        file = self.config.image.teacher
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

    def _total_steps(self) -> int:
        run = self.config.run
        batches = run.steps or sum(1 for _ in self.batches.epoch(0))
        return run.steps or max(1, run.epochs * batches // run.accumulate)

    def _all_parameters(self) -> dict[str, Tensor]:
        """What is trained; the rest is as it was loaded."""
        return {name: parameter.data for name, parameter in self.parameters.items()}

    def _stream(self, position: Any) -> Iterator[Any]:
        epoch, skip = position.epoch, position.batch
        while True:
            for number, examples in enumerate(self.batches.epoch(epoch, skip=skip), skip + 1):
                share = len(examples) // world_size()
                own = examples[rank() * share : (rank() + 1) * share]
                yield self._batch(own, epoch, number)
            epoch, skip = epoch + 1, 0

    def _batch(self, examples: Sequence[PictureExample], epoch: int, number: int) -> PictureBatch:
        numbers = [example.number for example in examples]
        features = None
        if self.features is not None:
            features = torch.from_numpy(np.array(self.features[numbers], np.float32))
        return PictureBatch(
            [example.text for example in examples],
            self.pictures.take(numbers, [example.view for example in examples]),
            features,
            epoch,
            number,
        )

    def _measure(self) -> dict[str, float]:
        if self.config.loss.objective == "dpr":
            found: dict[str, float] = self.held_out.measure_dense(self.texts, self.side)
        else:
            found = self.held_out.measure(self.both, self.side)
        return found

    def _save_model(self) -> None:
        dtype = DTYPES[self.config.model.save_dtype]
        save_pair(self.both, self.output / MODEL_FOLDER, dtype)
        if self.texts.dense is not None:
            dense = {name: p.detach() for name, p in self.texts.dense.named_parameters()}
            one = torch.tensor(self.config.image.as_one_patch)
            torch.save({**dense, "as_one_patch": one}, self.output / DENSE_FILE)

    def _set_training(self, mode: bool) -> None:
        self.both.image.tower.train(mode)
        self.encoder.document_tower.train(mode and self.config.image.train_text)

    @property
    def model(self) -> CrossModalEncoder:
        """Both encoders, as trained so far."""
        return self.both
