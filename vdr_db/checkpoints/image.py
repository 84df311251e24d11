"""Image encoders of our own folders and of VDR's cross-modal checkpoints: to parts, and back.

Nothing here makes an encoder: `load_image` hands out the parts, `ImageEncoder` is built of them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from vdr_db.checkpoints.digests import DIGESTS, check_digests, weight_digests
from vdr_db.checkpoints.folders import understood, written_folder
from vdr_db.checkpoints.graphs import chosen_runtime, folder_obstacles, trainable
from vdr_db.checkpoints.image_graph import open_image_tower, weight_file, write_image_graph
from vdr_db.checkpoints.image_plan import (
    IMAGE_FORMAT,
    OWN_IDS,
    OWN_ROWS,
    PROJECTION,
    ImagePlan,
    read_image_plan,
)
from vdr_db.checkpoints.layouts import IMAGE_FILE, TEXT_PART
from vdr_db.checkpoints.locate import find_tokenizer, locate_model
from vdr_db.checkpoints.text import LoadOptions
from vdr_db.checkpoints.weights import SAFETENSORS, Checkpoint, check_layers, save_weights
from vdr_db.images.preprocessing import Preprocessing
from vdr_db.kernels import Activation
from vdr_db.text.tokenization import TextTokenizer
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.onnx import OnnxImageTower

if TYPE_CHECKING:
    from vdr_db.towers.image import ImageTower

__all__ = ["ImageParts", "add_image_graph", "load_image", "save_image"]


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
        scale: What weights are multiplied with after that, or None.
        model: Name or folder it came from.
        revision: Revision on the hub.
        digest: Of the weights before they were rounded to the dtype; `""` where they were not.
    """

    tower: ImageTower | OnnxImageTower
    tokenizer: TextTokenizer
    vocabulary: Vocabulary
    preprocessing: Preprocessing
    activation: Activation
    k: int | None
    norm: bool
    scale: float | None = None
    model: str = ""
    revision: str = ""
    digest: str = ""


def load_image(name_or_folder: str | os.PathLike[str], options: LoadOptions) -> ImageParts:
    """The parts of an image encoder, see `ImageEncoder.from_pretrained`.

    Of the options those that it names count.

    Raises:
        ConfigError: The folder, a file in it, or an option is impossible.
        MissingExtraError: A hub id needs `huggingface_hub`.
    """
    folder, revision = locate_model(name_or_folder, options.revision)
    with understood(folder):
        return _load_image(folder, os.fspath(name_or_folder), revision, options)


def _load_image(folder: Path, model: str, revision: str, options: LoadOptions) -> ImageParts:
    plan = read_image_plan(folder)
    if (plan.folder / IMAGE_FILE).is_file():
        check_digests(plan.folder / IMAGE_FILE)
    _refuse_deep(plan)
    tokenizer = find_tokenizer((plan.folder, folder), options.tokenizer, hub_id=plan.tokenizer_id)
    vocabulary = Vocabulary.from_tokenizer(tokenizer, plan.vocabulary)
    obstacles = {
        **options.obstacles(),
        **folder_obstacles(plan.graphs, [weight_file(plan)], vocabulary.kind),
    }
    is_stored = options.is_described and (plan.folder / SAFETENSORS).is_file()
    runtime: Literal["onnx", "torch"] = "onnx"
    if not (is_stored and plan.body_kind in ("vit", "hybrid")):
        runtime = chosen_runtime(options.runtime, obstacles, device=options.device, folder=folder)
    tower: ImageTower | OnnxImageTower
    known = ""
    if runtime == "onnx":
        tower = open_image_tower(plan, vocabulary, options.threads, options.graph_runtime)
    else:
        from vdr_db.checkpoints.image_towers import build_tower

        tower, known = build_tower(plan, vocabulary, options.device, options.dtype)
    return ImageParts(
        tower=tower,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        preprocessing=plan.preprocessing,
        activation=plan.activation,  # type: ignore[arg-type] # checked by the encoder
        k=plan.k if options.k == "checkpoint" else options.k,
        norm=plan.norm,
        scale=plan.scale,
        model=model,
        revision=revision,
        digest=known,
    )


def _refuse_deep(plan: ImagePlan) -> None:
    """Refuses more layers than there are weights, before torch is imported to build them."""
    told = plan.body_settings
    for sizes in (told, told.get("config")):
        if isinstance(sizes, dict):
            for key in ("layers", "num_hidden_layers"):
                check_layers(sizes.get(key), Checkpoint(plan.folder))


def save_image(
    parts: ImageParts,
    folder: str | os.PathLike[str],
    *,
    own: npt.NDArray[np.int64] | None = None,
) -> None:
    """Writes an image encoder as a folder that `load_image` reads back.

    Args:
        parts: What to save.
        folder: Where to.
        own: Columns whose rows of the projection are not those of the text encoder in the folder
            `text` beside: only these are written. None writes the whole projection.

    Raises:
        ConfigError: The place holds something else, or cannot be written.
    """
    import torch

    tower = trainable(parts.tower)
    settings = {
        "format": IMAGE_FORMAT,
        "body": {"kind": tower.body.kind, "settings": tower.body.settings()},
        "preprocessing": parts.preprocessing.to_dict(),
        "activation": parts.activation,
        "vocabulary": parts.vocabulary.kind,
        "norm": parts.norm,
        "k": parts.k,
        **({} if parts.scale is None else {"scale": parts.scale}),
        **({} if own is None else {"projection": TEXT_PART}),
    }
    weights = tower.state_dict()
    if own is not None:
        rows = weights.pop(PROJECTION)[own]
        if own.size:
            ids = parts.vocabulary.column_to_id[own]
            weights |= {OWN_ROWS: rows, OWN_IDS: rows.new_tensor(ids, dtype=torch.int32)}
    with written_folder(folder, IMAGE_FILE) as fresh:
        save_weights(weights, fresh / SAFETENSORS)
        parts.tokenizer.save(fresh)
        settings[DIGESTS] = weight_digests(fresh)
        content = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (fresh / IMAGE_FILE).write_text(content, "utf-8")


def add_image_graph(folder: str | os.PathLike[str]) -> None:
    """Writes the ONNX graph of an image encoder beside its weights.

    Args:
        folder: That `save_image` wrote, or that of the `CrossModalEncoder` around it.

    Raises:
        ConfigError: The folder is of another kind, or the body has no graph.
        MissingExtraError: `onnx` is not installed.
    """
    plan = read_image_plan(Path(folder))
    write_image_graph(plan, plan.folder / IMAGE_FILE)
