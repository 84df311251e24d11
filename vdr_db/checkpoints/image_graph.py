"""The ONNX graph of an image encoder: written beside its weights, and opened as a tower.

A projection that is the matrix of the text encoder lies in another folder, and a graph may point
only to files below its own: then it lies in the folder of the `CrossModalEncoder` around both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vdr_db.checkpoints.graphs import matrix_rows, note_graphs, stored_weights
from vdr_db.checkpoints.image_plan import PROJECTION, ImagePlan
from vdr_db.checkpoints.layouts import read_plan
from vdr_db.checkpoints.text_names import DECODER, WORDS, weight_names
from vdr_db.checkpoints.weights import SAFETENSORS, Checkpoint
from vdr_db.errors import ConfigError
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.image_config import BodySizes, HybridConfig, VitConfig, image_config
from vdr_db.towers.onnx import OnnxImageTower
from vdr_db.towers.stored import StoredTensor

__all__ = ["open_image_tower", "weight_files", "write_image_graph"]

GRAPH = "image.onnx"


def weight_files(plan: ImagePlan) -> list[Path]:
    """The safetensors files that the graph points to."""
    folders = [plan.folder, *([] if plan.matrix_of is None else [plan.matrix_of])]
    return [folder / SAFETENSORS for folder in folders]


def open_image_tower(
    plan: ImagePlan, vocabulary: Vocabulary, threads: int | None
) -> OnnxImageTower:
    """The tower; nothing is loaded yet.

    Args:
        plan: Of a folder with a graph.
        vocabulary: Of the columns.
        threads: Of the session; None for one a core.

    Raises:
        ConfigError: Weights are missing.
    """
    weights, config = _weights(plan), _config(plan)
    width = config.output_size if isinstance(config, HybridConfig) else config.hidden_size
    tower = OnnxImageTower(
        _graph_file(plan),
        weights,
        BodySizes(config.image_size, config.patches, width),
        head_name="image",
        matrix=PROJECTION,
        column_to_row=_rows(plan, weights, vocabulary),
        threads=threads,
    )
    tower.constants = asdict(config)
    return tower


def write_image_graph(plan: ImagePlan, settings: Path) -> None:
    """Writes the graph, and what a settings file must say about it.

    Args:
        plan: Of a folder whose weights are one safetensors file.
        settings: The file.

    Raises:
        ConfigError: A weight is missing, or the body is a model of transformers.
        MissingExtraError: `onnx` is not installed.
    """
    from vdr_db.towers.onnx_image_graphs import image_graph

    file, weights = _graph_file(plan), _weights(plan)
    graph = image_graph(weights, file.parent, _config(plan))
    file.write_bytes(graph.SerializeToString(deterministic=True))
    note_graphs(settings, [file], weight_files(plan), plan.vocabulary)


def _graph_file(plan: ImagePlan) -> Path:
    return (plan.folder if plan.matrix_of is None else plan.folder.parent) / GRAPH


def _rows(
    plan: ImagePlan, weights: Mapping[str, StoredTensor], vocabulary: Vocabulary
) -> npt.NDArray[np.int64]:
    """Row of the projection of each column: a lent matrix has one for each token id."""
    if plan.matrix_of is None:
        return np.arange(weights[PROJECTION].shape[0])
    return matrix_rows(vocabulary)


def _config(plan: ImagePlan) -> VitConfig | HybridConfig:
    if plan.body_kind not in ("vit", "hybrid"):
        raise ConfigError(
            f"the image body of {plan.folder} must be of kind 'vit' or 'hybrid' for an ONNX graph, "
            f"got {plan.body_kind!r}; load it with runtime='torch'."
        )
    return image_config(plan.body_kind, plan.body_settings)


def _weights(plan: ImagePlan) -> dict[str, StoredTensor]:
    checkpoint = Checkpoint(plan.folder)
    names = plan.names or {name: (name,) for name in checkpoint.names}
    if plan.matrix_of is None:
        return stored_weights(checkpoint, names)
    text = read_plan(plan.matrix_of)
    lender = Checkpoint(text.folder)
    lent, _ = weight_names(text, text.document, lender)
    matrix = DECODER if DECODER in lent else WORDS
    return {
        **stored_weights(checkpoint, names),
        **stored_weights(lender, {PROJECTION: lent[matrix]}),
    }
