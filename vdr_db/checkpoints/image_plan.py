"""What a model folder says about its image encoder: our own layout, and VDR's.

| layout       | recognised by                                                            |
|--------------|--------------------------------------------------------------------------|
| vdr_db       | `vdr_db_image.json`; in the folder of a `CrossModalEncoder`, below `image/` |
| VDR upstream | an encoder of type `vdr_crossmodal_image` or `vdr_cm_image` in `config.json` |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vdr_db.checkpoints.folders import settings_of
from vdr_db.checkpoints.layouts import IMAGE_FILE, IMAGE_PART, OWN_FILE, TEXT_PART
from vdr_db.checkpoints.plan import GRAPHS
from vdr_db.checkpoints.upstream import DEFAULT_K, DOCUMENT, HEAD_WIDTH, IMAGE_TYPES, QUERY
from vdr_db.checkpoints.weights import Checkpoint
from vdr_db.errors import ConfigError
from vdr_db.images.preprocessing import Preprocessing
from vdr_db.towers.families import WeightNames
from vdr_db.towers.image_config import VitConfig

__all__ = [
    "IMAGE_FORMAT",
    "OWN_IDS",
    "OWN_ROWS",
    "OWN_SCALES",
    "PROJECTION",
    "ImagePlan",
    "read_image_plan",
    "upstream_names",
]

IMAGE_FORMAT = 1
PROJECTION = "head.projection"
OWN_ROWS, OWN_IDS = "head.own_rows", "head.own_ids"
"""Rows of a projection that the text encoder lends all others of, and their token ids."""
OWN_SCALES = "head.own_scales"
"""Where rows are 8 bit integers: `[M]`, what one step of a row stands for."""
UPSTREAM_TOKENIZER = "bert-base-uncased"


@dataclass(frozen=True)
class ImagePlan:
    """What a folder says about its image encoder.

    Attributes:
        folder: The folder with the weights.
        body_kind: `"vit"`, `"hybrid"` or `"transformers"`.
        body_settings: Of that kind, as `ImageBody.settings` told them.
        names: Parameter of the tower -> its names in the file; empty where they are the same.
        preprocessing: How images become pixels.
        vocabulary: Kind of the vocabulary.
        activation: Name of the activation.
        k: Dimensions kept of each image, or None for all.
        norm: Whether vectors have L2 norm 1 before selection.
        scale: What weights are multiplied with after that, or None.
        tokenizer_id: Model on the hub whose tokenizer is meant when the folder holds none.
        ignored: Prefixes of weights that belong to something else.
        matrix_of: Folder of the text encoder whose matrix is the projection, or None.
        graphs: What the folder says about its ONNX graph, or None.
    """

    folder: Path
    body_kind: str
    body_settings: Mapping[str, Any]
    names: WeightNames
    preprocessing: Preprocessing
    vocabulary: str
    activation: str
    k: int | None
    norm: bool
    scale: float | None = None
    tokenizer_id: str | None = None
    ignored: tuple[str, ...] = ()
    matrix_of: Path | None = None
    graphs: Mapping[str, Any] | None = None


def read_image_plan(folder: Path) -> ImagePlan:
    """What a model folder says about its image encoder.

    Raises:
        ConfigError: It holds none, or a file is missing or damaged.
    """
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


def _read_own(folder: Path) -> ImagePlan:
    file = folder / IMAGE_FILE
    saved = settings_of(file)
    if saved.get("format") != IMAGE_FORMAT:
        raise ConfigError(
            f"{file} must have format {IMAGE_FORMAT}, got {saved.get('format')!r}; "
            "install the version of vdr-db that wrote it."
        )
    try:
        return ImagePlan(
            folder=folder,
            body_kind=saved["body"]["kind"],
            body_settings=saved["body"]["settings"],
            names={},
            preprocessing=Preprocessing.from_dict(saved["preprocessing"]),
            vocabulary=saved["vocabulary"],
            activation=saved["activation"],
            k=saved["k"],
            norm=saved["norm"],
            scale=saved.get("scale"),
            matrix_of=_beside(file, saved.get("projection")),
            graphs=saved.get(GRAPHS),
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
    around = file.parent.parent
    place = around if (around / OWN_FILE).is_file() else around / TEXT_PART
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


def _read_upstream(folder: Path, side: str, settings: Mapping[str, Any]) -> ImagePlan:
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
    return ImagePlan(
        folder=folder,
        body_kind="vit",
        body_settings=asdict(config),
        names=upstream_names(side, len(numbers)),
        preprocessing=Preprocessing(size=side_px),
        vocabulary="ascii_from_999",
        activation="elu1p",
        k=None if k == -1 else k,
        norm=True,
        tokenizer_id=str(settings.get("tokenizer_id") or UPSTREAM_TOKENIZER),
        ignored=(f"{QUERY if side == DOCUMENT else DOCUMENT}.",),
    )
