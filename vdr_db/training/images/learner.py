"""One batch of texts and pictures: from vectors to gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vdr_db.training.image_settings import CrossModalConfig
from vdr_db.training.images.columns import sample_columns
from vdr_db.training.images.vectors import PictureSide, TextSide
from vdr_db.training.learner import DTYPES
from vdr_db.training.objective import Objective
from vdr_db.training.settings import LossConfig

__all__ = ["PictureBatch", "PictureLearner", "feature_distance"]


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
