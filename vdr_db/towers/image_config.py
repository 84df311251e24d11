"""Sizes and constants of image bodies, for those who plan, check and export without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vdr_db.errors import ConfigError

__all__ = ["BodySizes", "HybridConfig", "VitConfig", "image_config"]

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")


@dataclass(frozen=True)
class BodySizes:
    """What is known of an image body without its weights.

    Attributes:
        image_size: Side of the square it reads, in pixels.
        patches: Number P of patches of an image, in rows from the top.
        hidden_size: Width H of a patch's state.
    """

    image_size: int
    patches: int
    hidden_size: int


@dataclass(frozen=True)
class VitConfig:
    """Sizes and constants of a `VitBody`; the defaults are those of VDR's published one.

    Attributes:
        image_size: Side of an image in pixels, a multiple of `patch_size`.
        patch_size: Side of a patch in pixels.
        hidden_size: Width H of the hidden states.
        layers: Number of transformer layers.
        heads: Attention heads; divides `hidden_size`.
        intermediate_size: Width of the feed-forward part.
        norm_eps: Epsilon of the LayerNorms.
        activation: Of the feed-forward part.
    """

    image_size: int = 224
    patch_size: int = 32
    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    intermediate_size: int = 3072
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"

    def __post_init__(self) -> None:
        """Checks that sizes are possible.

        Raises:
            ConfigError: They are not.
        """
        sizes = ("image_size", "patch_size", "hidden_size", "layers", "heads", "intermediate_size")
        for name in sizes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"`{name}` of the image encoder must be an integer of at least 1, got "
                    f"{value!r}; its settings are damaged."
                )
        for whole, part in (("image_size", "patch_size"), ("hidden_size", "heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(
                    f"`{part}` of the image encoder must divide `{whole}` = "
                    f"{getattr(self, whole)}, got {getattr(self, part)}."
                )
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"the activation must be one of {sorted(ACTIVATIONS)}, got "
                f"{self.activation!r}; models with another one are not supported."
            )

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class HybridConfig(VitConfig):
    """Sizes and constants of a `HybridBody`.

    Attributes:
        output_size: Width H of the states it gives, which may be narrower than the layers: that of
            the matrix that comes after them.
        contrast: Each patch x becomes m + contrast * (x - m) before anything else, with m the mean
            of its image's patches. Below 1, a patch tells of the whole image as well as of
            itself: the maximum over patches then picks fewer words that one patch alone suggests.
    """

    image_size: int = 160
    hidden_size: int = 256
    layers: int = 1
    heads: int = 4
    intermediate_size: int = 1024
    output_size: int = 128
    contrast: float = 1.0

    def __post_init__(self) -> None:
        """Refuses sizes that no body can have.

        Raises:
            ConfigError: `contrast` is outside of [0, 1], or what `VitConfig` refuses.
        """
        super().__post_init__()
        if not 0 <= self.contrast <= 1:
            raise ConfigError(f"`contrast` must be in [0, 1], got {self.contrast}.")


def image_config(kind: str, settings: Mapping[str, Any]) -> VitConfig | HybridConfig:
    """Sizes and constants of a body that is our own, as `ImageBody.settings` described them.

    Args:
        kind: `"vit"` or `"hybrid"`.
        settings: Of that kind.

    Raises:
        ConfigError: The settings are not those of this kind, or impossible.
    """
    sizes = VitConfig if kind == "vit" else HybridConfig
    known = {field.name for field in fields(sizes)}
    if set(settings) != known:
        raise ConfigError(
            f"the settings of a ViT must be {sorted(known)}, got {sorted(settings)}; install "
            "the version of vdr-db that saved the encoder."
        )
    return sizes(**settings)
