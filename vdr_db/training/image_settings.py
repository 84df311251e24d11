"""Settings of the image side of a training run, the section `image` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vdr_db.errors import ConfigError
from vdr_db.kernels.names import Activation

__all__ = ["ImageConfig"]


@dataclass(frozen=True)
class ImageConfig:
    """The image side, and how its images are prepared.

    Attributes:
        start: Folder or hub id of a trained image encoder to go on from; empty for a new one, to
            which the following sizes apply.
        body: `"hybrid"` (a transformer on a convolutional stem) or `"vit"`.
        stem: File with the weights of the stem of a hybrid, see `vdr_db.towers.image_stem`. It
            stays as it is, so its states are computed once for all.
        size: Side of an image in pixels.
        crop: Cut the middle square out of an image; False squeezes the whole image into it.
        patch_size: Side of a patch in pixels; 32 for a hybrid.
        contrast: Of a new hybrid: how much the patches of an image differ, from 0 (each is shown
            as their mean) to 1 (as they are).
        hidden_size: Width of the hidden states.
        layers: Transformer layers.
        heads: Attention heads.
        intermediate_size: Width of the feed-forward parts.
        projection: `"text"` shares the matrix of the text side, which for a ViT must be as wide as
            `hidden_size`; where `train_text` trains its embeddings, images train them as well.
            `"own"` trains another one, which starts from it where widths agree. `"kept"` trains
            the rows of words that vectors of ten or more training texts keep, as queries or as
            documents; all others stay the texts'.
        activation: Of a new image side; None for that of the text side.
        head_scale: Factor of the norm of a new image head. It comes from the text side, whose
            logits may be too large for images to learn from: columns far below 0 have no slope.
        k: Columns of an image that the trained model keeps.
        sampled_columns: How many of the columns that no text of a batch keeps are drawn to estimate
            an image's length from, see `images.columns`, and a trained text's, see
            `sampled_lengths`; 0 computes all.
        dropout: Of the channels of a frozen stem, in training; what is dropped takes its mean.
        patch_dropout: Share of patches that `as_one_patch` leaves out of the mean in training,
            others at each step.
        train_text: Whether the text side is trained as well.
        views: Altered copies of every training image that are drawn from beside the image.
        cache: Folder for the states of a frozen stem; empty for `features` in the output folder.
        dense: Vectors of the objective `dpr`. `"heads"`: a linear map on the first token's state,
            another on the mean state of the patches. `"matrix"`: rows of the matrix, weighted by
            V(text) + BoW(text), and the mean state; their product is V(text) . V(image) without
            maximum and activation, a cheap warm-up for a second run that has it as `start`.
        as_one_patch: Give the body the mean state of a frozen stem as the only patch: the cheapest
            warm-up for a second run that sees all patches.
    """

    start: str = ""
    body: Literal["hybrid", "vit"] = "hybrid"
    stem: str = ""
    size: int = 192
    crop: bool = False
    patch_size: int = 32
    contrast: float = 1.0
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    intermediate_size: int = 512
    projection: Literal["text", "own", "kept"] = "text"
    activation: Activation | None = None
    head_scale: float = 1.0
    k: int | None = 256
    sampled_columns: int = 0
    dropout: float = 0.0
    patch_dropout: float = 0.0
    train_text: bool = False
    views: int = 0
    cache: str = ""
    dense: Literal["heads", "matrix"] = "heads"
    as_one_patch: bool = False

    def __post_init__(self) -> None:
        """Refuses values that are impossible by themselves."""
        if self.views < 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                "`image.views` must not be negative and `image.dropout` must be in [0, 1), got "
                f"{self.views} and {self.dropout}."
            )
        if self.patch_dropout and not (0 < self.patch_dropout < 1 and self.as_one_patch):
            raise ConfigError(
                "`image.patch_dropout` must be in [0, 1), and 0 without `image.as_one_patch`, the "
                f"mean that it is about; got {self.patch_dropout}."
            )
