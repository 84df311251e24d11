"""From an image to the numbers a vision model reads: resize, crop, scale, normalise.

The computation of CLIP, as torchvision does it on PIL images: the short side becomes `size` pixels
by bicubic interpolation with antialiasing, the middle square is cut out, and each colour is scaled
to [0, 1], less its mean, over its standard deviation. Only Pillow and NumPy are needed.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
ICML 2021, and its published code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vdr_db.errors import ConfigError, require

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CLIP_MEAN", "CLIP_STD", "Preprocessing"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

RESAMPLING = ("bicubic", "bilinear", "nearest")

LONGEST_RATIO = 32
"""An image longer than this many times its width loses its ends before it is resized.

They would be cut off afterwards anyway; but 1 by 60,000 pixels would first become 224 by 13
million."""


@dataclass(frozen=True)
class Preprocessing:
    """How images become `[3, size, size]` numbers.

    Attributes:
        size: Side of the square a model sees, in pixels.
        short_side: Side that the shorter side of an image becomes before the square is cut out;
            None for `size`.
        crop: Whether the middle square is cut out; else the whole image is squeezed into it.
        resample: `"bicubic"`, `"bilinear"` or `"nearest"`.
        mean: Of red, green and blue, in [0, 1].
        std: Standard deviation of each.
    """

    size: int = 224
    short_side: int | None = None
    crop: bool = True
    resample: str = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        """Checks that the numbers are possible.

        Raises:
            ConfigError: One is not.
        """
        short = self.size if self.short_side is None else self.short_side
        if not (_is_int(self.size) and _is_int(short) and 1 <= self.size <= short <= 4096):
            raise ConfigError(
                "`size` and `short_side` must be integers with 1 <= size <= short_side <= 4096, "
                f"got {self.size!r} and {self.short_side!r}."
            )
        if self.resample not in RESAMPLING:
            raise ConfigError(f"`resample` must be one of {RESAMPLING}, got {self.resample!r}.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(
                "`mean` and `std` must be three numbers each, those of `std` positive, got "
                f"{self.mean!r} and {self.std!r}."
            )

    def apply(self, image: Image) -> npt.NDArray[np.float32]:
        """The image as a model reads it.

        Args:
            image: In mode RGB.

        Returns:
            `[3, size, size]` float32.
        """
        scaled = np.asarray(self.square(image), np.float32) / np.float32(255)
        normal = (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normal.transpose(2, 0, 1))

    def square(self, image: Image) -> Image:
        """The part of an image in mode RGB that a model sees, `size` by `size` pixels."""
        filters = require("PIL.Image", "images").Resampling
        resample = getattr(filters, self.resample.upper())
        scaled = (self.size, self.size)
        if self.crop:
            image = _without_ends(image)
            short = self.size if self.short_side is None else self.short_side
            shorter = min(image.size)
            width, height = (int(short * side / shorter) for side in image.size)
            scaled = (width, height)
        if scaled != image.size:
            image = image.resize(scaled, resample)
        if not self.crop:
            return image
        # Halves are rounded to even, as torchvision does.
        left, top = (round((side - self.size) / 2) for side in scaled)
        return image.crop((left, top, left + self.size, top + self.size))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Preprocessing:
        """The settings that `to_dict` wrote.

        Raises:
            ConfigError: A setting is unknown or impossible.
        """
        unknown = sorted(set(saved) - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigError(
                f"the preprocessing of images has no setting {', '.join(unknown)}; install the "
                "version of vdr-db that saved the encoder."
            )
        values = dict(saved)
        try:
            for name in {"mean", "std"} & values.keys():
                values[name] = tuple(float(value) for value in values[name])
        except (TypeError, ValueError) as error:
            raise ConfigError(f"`mean` and `std` must be three numbers each: {error}.") from error
        return cls(**values)


def _without_ends(image: Image) -> Image:
    longest = LONGEST_RATIO * min(image.size)
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.size[0] - width) // 2, (image.size[1] - height) // 2
    return (
        image.crop((left, top, left + width, top + height))
        if (width, height) != image.size
        else image
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
