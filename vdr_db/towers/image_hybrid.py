"""A hybrid vision transformer: its patches are the feature map of a convolutional stem.

    pixels [B, 3, S, S] -> stem [B, P, C] -> contrast, linear, position, norm
        -> layers [B, P, width] -> linear [B, P, H]

Transformers of this size learn little from a few thousand images alone; a stem that knows edges,
shapes and parts leaves them the words. The stem may stay as it is while the rest is trained: its
states can then be computed once and kept (`HybridBody.features`, `HybridBody.contextualise`).

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, section 3.1.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vdr_db.errors import ConfigError
from vdr_db.towers.image_body import ImageBody, VitLayers, rows_to_fill
from vdr_db.towers.image_config import HybridConfig
from vdr_db.towers.image_stem import ConvolutionalStem
from vdr_db.towers.text_body import Linear, unfilled

__all__ = ["HybridBody", "HybridConfig"]


class HybridBody(ImageBody):
    """Transformer layers on a convolutional stem; made without weights.

    Attributes:
        config: Sizes and constants; the patch size is the stride of the stem.
        stem: From pixels to a feature map.
    """

    kind = "hybrid"

    def __init__(self, config: HybridConfig) -> None:
        """Builds the modules on the meta device.

        Raises:
            ConfigError: The patch size is not the stem's.
        """
        super().__init__()
        if config.patch_size != ConvolutionalStem.stride:
            raise ConfigError(
                f"`patch_size` of a hybrid must be {ConvolutionalStem.stride}, the stride of its "
                f"stem, got {config.patch_size}."
            )
        self.config = config
        self.image_size = config.image_size
        self.patches = config.patches
        self.hidden_size = config.output_size
        self.stem = ConvolutionalStem()
        self.narrow = Linear(config.hidden_size, ConvolutionalStem.channels)
        self.position = unfilled(config.patches, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, device="meta")
        self.layers = VitLayers(config)
        self.output = Linear(config.output_size, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """States of all patches, `[B, P, H]`."""
        return self.contextualise(self.features(pixels))

    def features(self, pixels: Tensor) -> Tensor:
        """What the stem makes of images: `[B, 3, S, S]` to `[B, P, C]`."""
        return self.stem(pixels)  # type: ignore[no-any-return]

    def contextualise(self, features: Tensor) -> Tensor:
        """What the transformer makes of that: `[B, P, C]` to `[B, P, H]`.

        An image may also be given as one patch, `[B, 1, C]`, such as the mean of all of them.
        """
        count, P = features.shape[:2]
        if self.config.contrast != 1:
            mean = features.mean(dim=1, keepdim=True)
            features = mean + self.config.contrast * (features - mean)
        rest = rows_to_fill(count * P, features.device)
        hidden = self.narrow(F.pad(features.flatten(0, 1), (0, 0, 0, rest)))
        places = self.position if self.patches == P else self.position.mean(dim=0, keepdim=True)
        position = places.expand(count, -1, -1).flatten(0, 1)
        hidden = self.norm(hidden + F.pad(position, (0, 0, 0, rest)))
        return self.output(self.layers(hidden, count, P))  # type: ignore[no-any-return]

    def settings(self) -> dict[str, Any]:
        """Sizes and constants."""
        return asdict(self.config)
