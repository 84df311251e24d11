"""Model folders that run without torch: saved anew, with ONNX graphs beside the weights."""

from __future__ import annotations

import os
from typing import Any, get_args

from vdr_db.checkpoints.graphs import add_graphs
from vdr_db.checkpoints.image import add_image_graph
from vdr_db.checkpoints.layouts import CROSS_MODAL_FILE, IMAGE_FILE
from vdr_db.checkpoints.locate import locate_model
from vdr_db.encoders.cross_modal import CrossModalEncoder
from vdr_db.encoders.image import ImageEncoder
from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import require
from vdr_db.towers.interface import Precision

__all__ = ["export"]


def export(
    name_or_folder: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    revision: str | None = None,
) -> None:
    """Writes a model as a folder that runs on torch and, without it, on ONNX Runtime.

    Vectors of both runtimes agree up to rounding, and their stamps are equal.

    Args:
        name_or_folder: A model of texts, of images or of both; a folder, else a name.
        folder: Where to; as in `save_pretrained`.
        dtype: Of the saved weights; `"float16"` halves the folder and rounds them.
        revision: Branch, tag or commit on the hub.

    Raises:
        ConfigError: The model cannot be loaded, a part of it has no graph, or the place holds
            something else.
        MissingExtraError: torch or onnx is not installed.
    """
    for package in ("torch", "onnx"):
        require(package, "export")
    source, _ = locate_model(name_or_folder, revision)
    kind: type[CrossModalEncoder | ImageEncoder | SparseEncoder] = SparseEncoder
    if (source / CROSS_MODAL_FILE).is_file():
        kind = CrossModalEncoder
    elif (source / IMAGE_FILE).is_file():
        kind = ImageEncoder
    name = "precision" if dtype in get_args(Precision) and kind is not ImageEncoder else "dtype"
    options: dict[str, Any] = {name: dtype, "device": "cpu", "runtime": "torch"}
    kind.from_pretrained(source, **options).save_pretrained(folder)
    if kind is not ImageEncoder:
        add_graphs(folder)
    if kind is not SparseEncoder:
        add_image_graph(folder)
