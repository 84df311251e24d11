"""Cross-modal training: a text and an image encoder on pairs of pictures and texts.

pairs -> V(text), BoW(text), V(picture) -> symmetric InfoNCE over all ranks -> gradients -> ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vdr_db.encoders.cross_modal import CrossModalEncoder
from vdr_db.errors import InputError
from vdr_db.towers.image_hybrid import HybridBody
from vdr_db.training.distributed import rank, world_size
from vdr_db.training.image_settings import CrossModalConfig
from vdr_db.training.images.data import Pair, PairBatches, PictureExample, read_pairs
from vdr_db.training.images.learner import PictureBatch, PictureLearner
from vdr_db.training.images.models import (
    channel_statistics,
    has_stem_states,
    load_pair,
    save_pair,
    standardise,
    trainable_pair,
)
from vdr_db.training.images.vectors import DenseHeads, PictureSide, TextSide
from vdr_db.training.images.views import Pictures, StemStates
from vdr_db.training.images.watch import HeldOutPairs
from vdr_db.training.learner import DTYPES
from vdr_db.training.models import set_dropout
from vdr_db.training.objective import Objective
from vdr_db.training.task import Task

__all__ = ["DENSE_FILE", "CrossModalTask"]


STATES_FOLDER = "features"
DENSE_FILE = "dense.pt"
SAMPLE = 1024
"""Pictures that the statistics of the stem's channels are taken from: the first ones."""


class CrossModalTask(Task[PictureExample, PictureBatch]):
    """A text and an image encoder trained on pairs.

    Attributes:
        config: All settings.
        on_states: Called with files of stem states done and in all, while they are computed.
        model: Both encoders, as trained so far; there once the task is loaded.
    """

    config: CrossModalConfig
    batches: PairBatches
    model: CrossModalEncoder

    def __init__(
        self, config: CrossModalConfig, on_states: Callable[[int, int], None] | None = None
    ) -> None:
        """Takes the settings; nothing is loaded yet."""
        self.config, self.on_states = config, on_states

    def load(self, device: torch.device, output: Path, scaler: torch.amp.GradScaler) -> None:
        """Loads encoders, stem states, features of a teacher and data; see `Task`."""
        config, image = self.config, self.config.image
        self.device, self.output = device, output
        self.batches = PairBatches(
            [(Path(item.path), item.weight) for item in config.data.train],
            config.run.batch_size,
            seed=config.run.seed,
            views=image.views,
            on_bad=config.data.on_bad,
        )
        self.model = load_pair(config, device)
        set_dropout(self.model.text, config.run.dropout)
        self.parameters = trainable_pair(self.model, config)
        self.pictures = self._pictures(self.batches.pairs, views=image.views)
        self.features = self._teacher_features(len(self.batches.pairs))
        self._make_sides()
        self.held_out: HeldOutPairs | None = None
        if config.evaluation.folder:
            pairs = read_pairs(Path(config.evaluation.folder))
            pairs = pairs[: config.evaluation.queries or None]
            self.held_out = HeldOutPairs(pairs, self._pictures(pairs, views=0))
        self.learner = PictureLearner(
            (self.texts, self.side), Objective(config.loss), config, scaler, self.mimic
        )

    def _make_sides(self) -> None:
        """Both sides, and what only training puts on them."""
        config, image = self.config, self.config.image
        width = self.model.image.tower.body.hidden_size
        dense = None
        is_dense = config.loss.objective == "dpr"
        if image.dense_weight or (is_dense and image.dense == "heads"):
            text_width = self.model.text.document_tower.body.config.hidden_size
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
        has_states = has_stem_states(self.model, image)
        centre = self._centred() if has_states else None
        self.texts = TextSide(
            self.model,
            is_frozen=not image.train_text,
            dense=dense,
            unit_sample=image.sampled_columns,
        )
        self.side = PictureSide(
            self.model,
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
        body = self.model.image.tower.body
        if isinstance(body, HybridBody) and not self.config.image.start:
            standardise(body, mean, deviation)
        return mean

    def _pictures(self, pairs: Sequence[Pair], *, views: int) -> Pictures:
        image = self.config.image
        preprocessing = self.model.image.preprocessing
        body = self.model.image.tower.body
        if not has_stem_states(self.model, image):
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

    def tensors(self) -> dict[str, Tensor]:
        """What is trained; the rest is as it was loaded."""
        return {name: parameter.data for name, parameter in self.parameters.items()}

    def batch(self, examples: Sequence[PictureExample], epoch: int, number: int) -> PictureBatch:
        """This rank's texts and pictures."""
        share = len(examples) // world_size()
        own = examples[rank() * share : (rank() + 1) * share]
        numbers = [example.number for example in own]
        features = None
        if self.features is not None:
            features = torch.from_numpy(np.array(self.features[numbers], np.float32))
        inputs = self.pictures.take(numbers, [example.view for example in own])
        return PictureBatch([example.text for example in own], inputs, features, epoch, number)

    def learn(self, batch: PictureBatch, *, regulariser: float, share: float) -> dict[str, float]:
        """Adds the gradient of one batch; see `Task`."""
        return self.learner.learn(batch, regulariser=regulariser, share=share)

    @property
    def is_watched(self) -> bool:
        """Whether there are held-out pairs to measure on."""
        return self.held_out is not None

    def measure(self) -> dict[str, float]:
        """Quality on the held-out pairs."""
        assert self.held_out is not None
        if self.config.loss.objective == "dpr":
            return self.held_out.measure_dense(self.texts, self.side)
        return self.held_out.measure(self.model, self.side)

    def save(self, folder: Path) -> None:
        """Writes both encoders, and beside them the dense heads where there are some."""
        save_pair(self.model, folder, DTYPES[self.config.model.save_dtype])
        if self.texts.dense is not None:
            dense = {name: p.detach() for name, p in self.texts.dense.named_parameters()}
            one = torch.tensor(self.config.image.as_one_patch)
            torch.save({**dense, "as_one_patch": one}, folder.parent / DENSE_FILE)

    def set_training(self, mode: bool) -> None:
        """Turns dropout on or off, of the text side only where it is trained."""
        self.model.image.tower.train(mode)
        self.model.text.document_tower.train(mode and self.config.image.train_text)
