"""Image encoders of our own folders and of VDR's cross-modal checkpoints: to parts, and back.

Nothing here makes an encoder: `load_image` hands out the parts, `ImageEncoder` is built of them.

| layout       | recognised by                                                            |
|--------------|--------------------------------------------------------------------------|
| vdr_db       | `vdr_db_image.json`; in the folder of a `CrossModalEncoder`, below `image/` |
| VDR upstream | an encoder of type `vdr_crossmodal_image` or `vdr_cm_image` in `config.json` |
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdr_db.checkpoints.folders import settings_of, written_folder
from vdr_db.checkpoints.layouts import IMAGE_FILE, IMAGE_PART, TEXT_PART
from vdr_db.checkpoints.locate import find_tokenizer, locate_model
from vdr_db.checkpoints.plan import FromCheckpoint
from vdr_db.checkpoints.text import LoadOptions, load_text
from vdr_db.checkpoints.upstream import DEFAULT_K, DOCUMENT, HEAD_WIDTH, IMAGE_TYPES, QUERY
from vdr_db.checkpoints.weights import (
    SAFETENSORS,
    Checkpoint,
    assign,
    checked_device,
    checked_dtype,
    digest,
    refuse_unexpected,
    save_weights,
)
from vdr_db.errors import ConfigError
from vdr_db.images.preprocessing import Preprocessing
from vdr_db.kernels import Activation
from vdr_db.text.tokenization import TextTokenizer
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.families import WeightNames
from vdr_db.towers.image import ImageHead, ImageTower, make_body
from vdr_db.towers.image_body import ImageBody, VitBody, VitConfig

__all__ = ["ImageLoadOptions", "ImageParts", "load_image", "save_image", "upstream_names"]

IMAGE_FORMAT = 1
PROJECTION = "head.projection"
UPSTREAM_TOKENIZER = "bert-base-uncased"


@dataclass(frozen=True)
class ImageLoadOptions:
    """Arguments of `ImageEncoder.from_pretrained`, which tells what they mean."""

    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    k: int | FromCheckpoint | None = "checkpoint"
    tokenizer: Any = None
    revision: str | None = None


@dataclass(frozen=True)
class ImageParts:
    """What an `ImageEncoder` is made of, by the names of its constructor.

    Attributes:
        tower: Body and head with their weights, on the device and in the dtype asked for.
        tokenizer: Whose tokens the columns are.
        vocabulary: Of the head.
        preprocessing: How images become pixels.
        activation: Turns scores into weights.
        k: Dimensions kept of each image, or None for all.
        norm: Whether vectors have L2 norm 1 before selection.
        model: Name or folder it came from.
        revision: Revision on the hub.
        digest: Of the weights before they were rounded to the dtype; `""` where they were not.
    """

    tower: ImageTower
    tokenizer: TextTokenizer
    vocabulary: Vocabulary
    preprocessing: Preprocessing
    activation: Activation
    k: int | None
    norm: bool
    model: str = ""
    revision: str = ""
    digest: str = ""


@dataclass(frozen=True)
class _ImagePlan:
    """What a folder says about its image encoder; `names` are those of its weights."""

    folder: Path
    body: ImageBody
    names: WeightNames
    preprocessing: Preprocessing
    vocabulary: str
    activation: str
    k: int | None
    norm: bool
    tokenizer_id: str | None = None
    ignored: tuple[str, ...] = ()
    matrix_of: Path | None = None  # folder of the text encoder whose matrix is the projection


def load_image(name_or_folder: str | os.PathLike[str], options: ImageLoadOptions) -> ImageParts:
    """The parts of an image encoder, see `ImageEncoder.from_pretrained`.

    Raises:
        ConfigError: The folder, a file in it, or an option is impossible.
        MissingExtraError: A hub id needs `huggingface_hub`.
    """
    folder, revision = locate_model(name_or_folder, options.revision)
    dtype, device = checked_dtype(options.dtype), checked_device(options.device)
    with torch.inference_mode(False):  # inference tensors could neither be trained nor stamped
        plan = _read_plan(folder)
        places = (plan.folder, folder)
        tokenizer = find_tokenizer(places, options.tokenizer, hub_id=plan.tokenizer_id)
        vocabulary = Vocabulary.from_tokenizer(tokenizer, plan.vocabulary)
        tower = ImageTower(plan.body, ImageHead(plan.body.hidden_size, vocabulary.columns))
        _fill(tower, plan)
        # before rounding, so that all dtypes of a model are one model
        known = "" if dtype == torch.float32 else digest(dict(tower.named_parameters()))
        tower.to(device=device, dtype=dtype).eval()
    return ImageParts(
        tower=tower,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        preprocessing=plan.preprocessing,
        activation=plan.activation,  # type: ignore[arg-type] # checked by the encoder
        k=plan.k if options.k == "checkpoint" else options.k,
        norm=plan.norm,
        model=os.fspath(name_or_folder),
        revision=revision,
        digest=known,
    )


def _fill(tower: ImageTower, plan: _ImagePlan) -> None:
    """Weights of the checkpoint, float32 on the CPU; counters and the like as they are stored."""
    checkpoint = Checkpoint(plan.folder)
    parameters = {name for name, _ in tower.named_parameters()}
    names = plan.names or {name: (name,) for name in tower.state_dict()}
    present = set(checkpoint.names)
    buffers = {
        ours: checkpoint.tensor(theirs[0])
        for ours, theirs in names.items()
        if ours not in parameters and theirs[0] in present
    }
    weights = {ours: theirs for ours, theirs in names.items() if ours in parameters}
    if plan.matrix_of is not None:
        weights.pop(PROJECTION)
        buffers[PROJECTION] = _text_matrix(plan.matrix_of)
    used = assign(tower, checkpoint, weights, others=buffers)
    refuse_unexpected(checkpoint, used | {names[ours][0] for ours in buffers}, plan.ignored)


def _text_matrix(folder: Path) -> Tensor:
    """A copy of the vocabulary matrix of a text encoder, `[V, H]` float32."""
    return load_text(folder, LoadOptions(device="cpu")).document_tower.matrix().detach().clone()


def save_image(parts: ImageParts, folder: str | os.PathLike[str], *, is_tied: bool = False) -> None:
    """Writes an image encoder as a folder that `load_image` reads back.

    Args:
        parts: What to save.
        folder: Where to.
        is_tied: The projection is the matrix of the text encoder in the folder `text` beside, and
            is not written.

    Raises:
        ConfigError: The place holds something else, or cannot be written.
    """
    settings = {
        "format": IMAGE_FORMAT,
        "body": {"kind": parts.tower.body.kind, "settings": parts.tower.body.settings()},
        "preprocessing": parts.preprocessing.to_dict(),
        "activation": parts.activation,
        "vocabulary": parts.vocabulary.kind,
        "norm": parts.norm,
        "k": parts.k,
        **({"projection": TEXT_PART} if is_tied else {}),
    }
    weights = parts.tower.state_dict()
    if is_tied:
        del weights[PROJECTION]
    with written_folder(folder, IMAGE_FILE) as fresh:
        save_weights(weights, fresh / SAFETENSORS)
        parts.tokenizer.save(fresh)
        content = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (fresh / IMAGE_FILE).write_text(content, "utf-8")


# Reading


def _read_plan(folder: Path) -> _ImagePlan:
    for place in (folder, folder / IMAGE_PART):
        if (place / IMAGE_FILE).is_file():
            return _read_own(place)
    config = settings_of(folder / "config.json") if (folder / "config.json").is_file() else {}
    for side in (DOCUMENT, QUERY):
        settings = config.get(side)
        if isinstance(settings, Mapping) and settings.get("type") in IMAGE_TYPES:
            return _read_upstream(folder, side, settings)
    raise ConfigError(
        f"{folder} must hold an image encoder ({IMAGE_FILE}, or a config.json with an encoder of "
        f"type {IMAGE_TYPES[0]!r}), got none; a text encoder is loaded by "
        "SparseEncoder.from_pretrained."
    )


def _read_own(folder: Path) -> _ImagePlan:
    file = folder / IMAGE_FILE
    saved = settings_of(file)
    if saved.get("format") != IMAGE_FORMAT:
        raise ConfigError(
            f"{file} must have format {IMAGE_FORMAT}, got {saved.get('format')!r}; "
            "install the version of vdr-db that wrote it."
        )
    try:
        return _ImagePlan(
            folder=folder,
            body=make_body(saved["body"]["kind"], saved["body"]["settings"]),
            names={},
            preprocessing=Preprocessing.from_dict(saved["preprocessing"]),
            vocabulary=saved["vocabulary"],
            activation=saved["activation"],
            k=saved["k"],
            norm=saved["norm"],
            matrix_of=_beside(file, saved.get("projection")),
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} must hold the settings `save_pretrained` writes, but {error!r}; "
            "save the encoder anew."
        ) from error


def _beside(file: Path, projection: object) -> Path | None:
    """Folder of the text encoder that lends its matrix, or None."""
    if projection is None:
        return None
    place = file.parent.parent / TEXT_PART
    if projection != TEXT_PART or not place.is_dir():
        raise ConfigError(
            f"{file} takes its projection from a text encoder, which must lie in {place}, got "
            f"{projection!r}; fetch the whole folder of the cross-modal encoder."
        )
    return place


_UPSTREAM_LAYER = {
    "attended_norm.weight": "ln_1.weight",
    "attended_norm.bias": "ln_1.bias",
    "inputs.weight": "attn.in_proj_weight",
    "inputs.bias": "attn.in_proj_bias",
    "attended.weight": "attn.out_proj.weight",
    "attended.bias": "attn.out_proj.bias",
    "wide_norm.weight": "ln_2.weight",
    "wide_norm.bias": "ln_2.bias",
    "up.weight": "mlp.c_fc.weight",
    "up.bias": "mlp.c_fc.bias",
    "down.weight": "mlp.c_proj.weight",
    "down.bias": "mlp.c_proj.bias",
}
_UPSTREAM_REST = {
    "body.patch": "conv1.weight",
    "body.position": "positional_embedding",
    "body.norm.weight": "ln_pre.weight",
    "body.norm.bias": "ln_pre.bias",
    "head.norm.weight": "ln_post.weight",
    "head.norm.bias": "ln_post.bias",
    "head.projection": "proj",
}


def upstream_names(side: str, layers: int) -> WeightNames:
    """Parameter of an `ImageTower` with a `VitBody` -> its name in a published checkpoint.

    Args:
        side: Prefix of the encoder without its dot.
        layers: Of the body.
    """
    names: WeightNames = {ours: (f"{side}.{theirs}",) for ours, theirs in _UPSTREAM_REST.items()}
    for i in range(layers):
        for ours, theirs in _UPSTREAM_LAYER.items():
            names[f"body.layers.{i}.{ours}"] = (f"{side}.transformer.resblocks.{i}.{theirs}",)
    return names


def _read_upstream(folder: Path, side: str, settings: Mapping[str, Any]) -> _ImagePlan:
    file = folder / "config.json"
    checkpoint = Checkpoint(folder)
    known = upstream_names(side, 1)
    needed = ("body.patch", "body.position", "body.layers.0.up.weight")
    missing = [known[name][0] for name in needed if known[name][0] not in checkpoint.names]
    if missing:
        raise ConfigError(
            f"the weights in {folder} lack {', '.join(missing)}; fetch the model again."
        )
    patch, position, up = (checkpoint.shape(known[name][0]) for name in needed)
    blocks = f"{side}.transformer.resblocks."
    numbers = {n.removeprefix(blocks).split(".")[0] for n in checkpoint.names if blocks in n}
    width, patch_size = patch[0], patch[-1]
    k = settings.get("topk", DEFAULT_K)
    k = DEFAULT_K if k is None else k
    if not isinstance(k, int) or k == 0 or k < -1:
        raise ConfigError(f"`topk` of {side} in {file} must be -1 or at least 1, got {k!r}.")
    # Sizes are read off the weights; these two are not to be seen there with certainty.
    side_px = settings.get("resolution") or round(position[0] ** 0.5) * patch_size
    config = VitConfig(
        image_size=side_px,
        patch_size=patch_size,
        hidden_size=width,
        layers=len(numbers),
        heads=settings.get("heads") or max(1, width // HEAD_WIDTH),
        intermediate_size=up[0],
    )
    return _ImagePlan(
        folder=folder,
        body=VitBody(config),
        names=upstream_names(side, len(numbers)),
        preprocessing=Preprocessing(size=side_px),
        vocabulary="ascii_from_999",
        activation="elu1p",
        k=None if k == -1 else k,
        norm=True,
        tokenizer_id=str(settings.get("tokenizer_id") or UPSTREAM_TOKENIZER),
        ignored=(f"{QUERY if side == DOCUMENT else DOCUMENT}.",),
    )
