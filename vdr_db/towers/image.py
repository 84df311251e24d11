"""An image body and its head: from pixels to one score for each image and column.

The head is that of VDR's text encoder with a matrix of its own: LayerNorm on the state of each
patch, then the product with one row for each column of the vocabulary, and the maximum over the
patches. Patches are positions, so `vdr_db.kernels.project_pool` does it without `[B, P, V]`.

Source: Zhou et al., "Retrieval-based Disentangled Representation Learning with Natural Language
Supervision", ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdr_db.errors import ConfigError, ShapeError, require
from vdr_db.kernels import Backend, Pooled, project_pool
from vdr_db.towers.image_body import (
    ImageBody,
    TransformersBody,
    VitBody,
    rows_to_fill,
)
from vdr_db.towers.image_config import HybridConfig, image_config
from vdr_db.towers.image_hybrid import HybridBody
from vdr_db.towers.text_body import unfilled
from vdr_db.towers.torch_tower import TorchTower

__all__ = ["ImageHead", "ImageTower", "make_body"]

HEAD_NORM_EPS = 1e-5


class ImageHead(nn.Module):
    """LayerNorm and a projection of its own; made without weights.

    Attributes:
        norm: Of the states.
        projection: `[V, H]`, one row for each column of the vocabulary.
    """

    def __init__(self, hidden_size: int, columns: int) -> None:
        """Builds the parts on the meta device."""
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=HEAD_NORM_EPS, device="meta")
        self.projection = unfilled(columns, hidden_size)


class ImageTower(TorchTower):
    """A body and its head.

    Attributes:
        body: From pixels to states of patches.
        head: From states to scores.
    """

    def __init__(self, body: ImageBody, head: ImageHead) -> None:
        """Takes the parts over."""
        super().__init__()
        self.body = body
        self.head = head

    @property
    def head_name(self) -> str:
        """Name of the head in stamps."""
        return "image"

    @property
    def config(self) -> ImageBody:
        """Sizes of the body, which tells them itself."""
        return self.body

    @property
    def constants(self) -> dict[str, Any]:
        """What the body has beside weights, as JSON types."""
        return self.body.settings()

    def matrix(self) -> Tensor:
        """The projection, `[V, H]`."""
        return self.head.projection

    def states(self, item: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """States of an image's patches after the head's norm, `[P, H]` float32.

        Args:
            item: `[3, S, S]` float32, preprocessed pixels.
        """
        with self.evaluating():
            pixels = torch.from_numpy(item)[None].to(self.device)
            hidden = self.head.norm(self.body(pixels.to(self.dtype)))[0]
        found: npt.NDArray[np.float32] = hidden.float().cpu().numpy()
        return found

    def pooled(self, item: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Largest score of each column over the patches of an image, `[V]` float32."""
        with self.evaluating():
            logits = self(torch.from_numpy(item)[None].to(self.device)).logits[0]
        found: npt.NDArray[np.float32] = logits.cpu().numpy()
        return found

    def forward(
        self, pixels: Tensor, *, backend: Backend = "auto", return_argmax: bool = False
    ) -> Pooled:
        """Scores of each image and column before activation; differentiable.

        Args:
            pixels: `[B, 3, S, S]`, preprocessed.
            backend: Of the kernels.
            return_argmax: Whether to tell which patch gave each score.

        Returns:
            `logits` `[B, V]` float32, `argmax` `[B, V]` int32 (number of the patch) or None.

        Raises:
            ShapeError: `pixels` has another shape.
        """
        side = self.body.image_size
        if tuple(pixels.shape[1:]) != (3, side, side):
            raise ShapeError(
                f"`pixels` must be [B, 3, {side}, {side}], got {list(pixels.shape)}; preprocess "
                "images with the encoder's own `preprocessing`."
            )
        hidden = self.head.norm(self.body(pixels.to(self.head.projection.dtype)))
        count, patches = hidden.shape[:2]
        packed = hidden.flatten(0, 1)
        bounds = torch.arange(count + 1, dtype=torch.int32) * patches
        rest = rows_to_fill(packed.shape[0], packed.device)
        if rest:  # one more document that is thrown away; see `ROW_MULTIPLE`
            packed = F.pad(packed, (0, 0, 0, rest))
            bounds = torch.cat([bounds, bounds[-1:] + rest])
        pooled: Pooled = project_pool(
            packed,
            bounds.to(packed.device, non_blocking=True),
            self.head.projection,
            return_argmax=return_argmax,
            backend=backend,
        )
        argmax = None if pooled.argmax is None else pooled.argmax[:count]
        return Pooled(pooled.logits[:count], argmax)


def make_body(kind: str, settings: Mapping[str, Any]) -> ImageBody:
    """A body without its weights, as `ImageBody.settings` described it.

    Args:
        kind: `"vit"`, `"hybrid"` or `"transformers"`.
        settings: Of that kind.

    Raises:
        ConfigError: The kind is unknown, or the settings are impossible.
        MissingExtraError: `transformers` is needed and not installed.
    """
    if kind in (VitBody.kind, HybridBody.kind):
        config = image_config(kind, settings)
        return HybridBody(config) if isinstance(config, HybridConfig) else VitBody(config)
    if kind == TransformersBody.kind:
        return TransformersBody(_transformers_model(settings))
    raise ConfigError(
        f"an image body must be of kind 'vit', 'hybrid' or 'transformers', got {kind!r}."
    )


def _transformers_model(settings: Mapping[str, Any]) -> nn.Module:
    transformers = require("transformers", "torch")
    name = settings.get("class")
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ConfigError(
            f"the image body must be a model class of transformers, got {name!r}; install a "
            "version of transformers that has it."
        )
    try:
        config = kind.config_class.from_dict(dict(settings["config"]))  # type: ignore[attr-defined]
        with torch.random.fork_rng(devices=[]):  # it fills weights that are replaced anyway
            return kind(config, **settings["options"])  # type: ignore[no-any-return]
    except Exception as error:  # whatever a foreign model raises, its settings are what is wrong
        raise ConfigError(
            f"{name} cannot be built from its saved configuration: {error}; install the version "
            "of transformers that saved it."
        ) from error
