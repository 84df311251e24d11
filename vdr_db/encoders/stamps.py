"""The stamp of a model folder, without loading the model."""

from __future__ import annotations

import os
from dataclasses import replace

from vdr_db.checkpoints.image import load_image
from vdr_db.checkpoints.layouts import CROSS_MODAL_FILE, IMAGE_FILE
from vdr_db.checkpoints.locate import locate_model
from vdr_db.checkpoints.text import LoadOptions, load_text
from vdr_db.encoders.image import ImageEncoder
from vdr_db.encoders.text import SparseEncoder
from vdr_db.stamp import EncoderStamp

__all__ = ["read_stamp"]


def read_stamp(
    name_or_folder: str | os.PathLike[str], *, revision: str | None = None
) -> EncoderStamp:
    """What `stamp()` of the encoder of a folder gives, under both runtimes.

    Needs neither graphs nor torch where the body is one of this library's and the weights are in
    safetensors files, which are read once for their digest; any other model is loaded.

    Args:
        name_or_folder: A folder, else the id of a model on the hub.
        revision: Branch, tag or commit on the hub.

    Raises:
        ConfigError: The folder, or a file in it, is impossible.
    """
    folder, found = locate_model(name_or_folder, revision)
    options, model = LoadOptions(is_described=True), os.fspath(name_or_folder)
    if (folder / IMAGE_FILE).is_file():
        return _of_images(folder, options, model, found)
    text = SparseEncoder(**vars(load_text(folder, options))).stamp()
    image = None
    if (folder / CROSS_MODAL_FILE).is_file():
        image = _of_images(folder, options, model, "")
    return replace(text, model=model, revision=found, image=image)


def _of_images(
    folder: os.PathLike[str], options: LoadOptions, model: str, revision: str
) -> EncoderStamp:
    image = ImageEncoder(**vars(load_image(folder, options))).stamp()
    return replace(image, model=model, revision=revision)
