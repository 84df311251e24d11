"""Bodies of image encoders: from pixels to one hidden state for each patch.

`ImageBody` is the whole interface. Three bodies stand behind it:

- `VitBody`: the vision transformer of VDR's published code, CLIP's ViT without a class token. It
  runs on packed rows like the text bodies, so that an image's bits do not depend on its batch.
- `HybridBody` (`vdr_db.towers.image_hybrid`): the same transformer on the feature map of a
  convolutional stem.
- `TransformersBody`: any vision model of `transformers` that gives states of patches, such as
  `ViTModel` or `CLIPVisionModel`; states of class and register tokens are left out.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; Radford et al., "Learning
Transferable Visual Models From Natural Language Supervision", ICML 2021.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdr_db.errors import ConfigError
from vdr_db.towers.image_config import VitConfig
from vdr_db.towers.packing import ROW_MULTIPLE, Run
from vdr_db.towers.text_body import ACTIVATIONS, Linear, attend, unfilled

__all__ = [
    "ImageBody",
    "TransformersBody",
    "VitBody",
    "VitConfig",
    "VitLayers",
    "rows_to_fill",
]

COLOURS = 3


def _quick_gelu(x: Tensor) -> Tensor:
    # x times the logistic function of 1.702 x, through tanh for the reason given in `text_body`.
    return x * (0.5 * (1.0 + torch.tanh(0.851 * x)))


VIT_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATIONS,
    "quick_gelu": _quick_gelu,
}


class ImageBody(nn.Module, ABC):
    """What an image encoder needs of a vision model.

    Attributes:
        kind: Name of the kind of body in saved encoders.
        image_size: Side of the square it reads, in pixels.
        patches: Number P of patches of an image, in rows from the top.
        hidden_size: Width H of a patch's state.
    """

    kind: str
    image_size: int
    patches: int
    hidden_size: int

    @abstractmethod
    def forward(self, pixels: Tensor) -> Tensor:
        """States of all patches.

        Args:
            pixels: `[B, 3, image_size, image_size]`, preprocessed, in the dtype of the weights.

        Returns:
            `[B, P, H]` in the dtype of the weights.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What `make_body` of `vdr_db.towers.image` needs to build it again, as JSON types."""


class _VitLayer(nn.Module):
    """Self-attention and feed-forward, each on normalised states and with a residual."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width, wide = config.hidden_size, config.intermediate_size
        self.heads = config.heads
        self.activation = VIT_ACTIVATIONS[config.activation]
        self.attended_norm = nn.LayerNorm(width, eps=config.norm_eps, device="meta")
        self.inputs = Linear(3 * width, width)  # query, key and value in one
        self.attended = Linear(width, width)
        self.wide_norm = nn.LayerNorm(width, eps=config.norm_eps, device="meta")
        self.up = Linear(wide, width)
        self.down = Linear(width, wide)

    def forward(self, hidden: Tensor, runs: Sequence[Run]) -> Tensor:
        query, key, value = self.inputs(self.attended_norm(hidden)).chunk(3, dim=-1)
        attended = attend(
            query.contiguous(), key.contiguous(), value.contiguous(), runs, self.heads
        )
        hidden = hidden + self.attended(attended)
        return hidden + self.down(  # type: ignore[no-any-return]
            self.activation(self.up(self.wide_norm(hidden)))
        )


def rows_to_fill(rows: int, device: torch.device) -> int:
    """Rows to add for whole multiples, see `ROW_MULTIPLE`; a GPU picks kernels by size anyway."""
    return -rows % ROW_MULTIPLE if device.type == "cpu" else 0


class VitLayers(nn.ModuleList):
    """Transformer layers on the patches of images; made without weights."""

    def __init__(self, config: VitConfig) -> None:
        """Builds `config.layers` layers on the meta device."""
        super().__init__(_VitLayer(config) for _ in range(config.layers))

    def forward(self, hidden: Tensor, count: int, patches: int) -> Tensor:
        """States after all layers.

        Args:
            hidden: `[count * patches + rest, H]`; the rest is padding.
            count: Images.
            patches: P of each.

        Returns:
            `[count, P, H]`.
        """
        rows = count * patches
        rest = hidden.shape[0] - rows
        runs = [Run(start=0, count=count, length=patches, kept=patches)] if count else []
        if rest:
            runs.append(Run(start=rows, count=1, length=rest, kept=rest))
        for layer in self:
            hidden = layer(hidden, runs)
        return hidden[:rows].view(count, patches, hidden.shape[1])


class VitBody(ImageBody):
    """CLIP's vision transformer without a class token; made without weights.

    Its last norm belongs to the head (`vdr_db.towers.image`).

    Attributes:
        config: Sizes and constants.
    """

    kind = "vit"

    def __init__(self, config: VitConfig) -> None:
        """Builds the modules on the meta device: no memory is used before weights come."""
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.patches = config.patches
        self.hidden_size = config.hidden_size
        width, side = config.hidden_size, config.patch_size
        self.patch = unfilled(width, COLOURS, side, side)
        self.position = unfilled(config.patches, width)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps, device="meta")
        self.layers = VitLayers(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """States of all patches, `[B, P, H]`."""
        count, P = pixels.shape[0], self.patches
        rows = count * P
        rest = rows_to_fill(rows, pixels.device)
        patches = F.pad(self._patches(pixels), (0, 0, 0, rest))
        hidden = F.linear(patches, self.patch.flatten(1))
        position = self.position.expand(count, -1, -1).reshape(rows, -1)
        hidden = self.norm(hidden + F.pad(position, (0, 0, 0, rest)))
        return self.layers(hidden, count, P)  # type: ignore[no-any-return]

    def settings(self) -> dict[str, Any]:
        """Sizes and constants."""
        return asdict(self.config)

    def _patches(self, pixels: Tensor) -> Tensor:
        """`[B, 3, S, S]` to `[B * P, 3 * patch * patch]`, as a convolution takes them."""
        side = self.config.patch_size
        grid = self.image_size // side
        parts = pixels.reshape(-1, COLOURS, grid, side, grid, side)
        return parts.permute(0, 2, 4, 1, 3, 5).reshape(-1, COLOURS * side * side)


class TransformersBody(ImageBody):
    """A vision model of `transformers` that gives a state for each patch.

    Attributes:
        model: The model.
    """

    kind = "transformers"

    def __init__(self, model: nn.Module) -> None:
        """Takes a model over.

        Args:
            model: Its configuration tells `image_size`, `patch_size` and `hidden_size`; called
                with `pixel_values` it returns `last_hidden_state` `[B, T, H]`, whose last P of T
                positions are the patches.

        Raises:
            ConfigError: It is no such model.
        """
        super().__init__()
        config = getattr(model, "config", None)
        sizes = [
            getattr(config, name, None) for name in ("image_size", "patch_size", "hidden_size")
        ]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ConfigError(
                "an image body must have integers `image_size`, `patch_size` and `hidden_size` in "
                f"its config, got {sizes} from {type(model).__name__}; ViTModel and "
                "CLIPVisionModel are such models."
            )
        self.model = model
        self.image_size, patch_size, self.hidden_size = (int(size) for size in sizes if size)
        self.patches = (self.image_size // patch_size) ** 2

    def forward(self, pixels: Tensor) -> Tensor:
        """States of all patches, `[B, P, H]`.

        Raises:
            ConfigError: The model gives fewer states than it has patches.
        """
        states = self.model(pixel_values=pixels).last_hidden_state
        if states.dim() != 3 or states.shape[1] < self.patches:
            raise ConfigError(
                f"{type(self.model).__name__} must give states of {self.patches} patches, got "
                f"{list(states.shape)}; such a model is not supported."
            )
        return states[:, states.shape[1] - self.patches :]  # type: ignore[no-any-return]

    def settings(self) -> dict[str, Any]:
        """Name of the class, its configuration, and what that leaves open."""
        config = self.model.config.to_dict()  # type: ignore[operator, union-attr]
        options = {}
        if "add_pooling_layer" in signature(type(self.model)).parameters:
            options["add_pooling_layer"] = getattr(self.model, "pooler", None) is not None
        return {"class": type(self.model).__name__, "config": config, "options": options}
