"""The ONNX graph of an image encoder: written beside its weights, and opened as a tower.

It ends before the projection, which may lie in the folder of a text encoder.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from vdr_db.checkpoints.graphs import matrix_rows, note_graphs, stored_weights
from vdr_db.checkpoints.image_plan import OWN_IDS, OWN_ROWS, OWN_SCALES, PROJECTION, ImagePlan
from vdr_db.checkpoints.layouts import read_plan
from vdr_db.checkpoints.text_names import DECODER, WORDS, weight_names
from vdr_db.checkpoints.weights import SAFETENSORS, Checkpoint
from vdr_db.errors import ConfigError
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.image_config import BodySizes, HybridConfig, VitConfig, image_config
from vdr_db.towers.interface import GraphRuntime
from vdr_db.towers.onnx import OnnxImageTower
from vdr_db.towers.stored import RoundedTensor, SharedMatrix, StoredTensor, stored_tensors

__all__ = ["open_image_tower", "own_rows", "weight_file", "write_image_graph"]

GRAPH = "image.onnx"


def weight_file(plan: ImagePlan) -> Path:
    """The safetensors file that the graph points to."""
    return plan.folder / SAFETENSORS


def open_image_tower(
    plan: ImagePlan, vocabulary: Vocabulary, threads: int | None, runtime: GraphRuntime
) -> OnnxImageTower:
    """The tower; nothing is loaded yet.

    Args:
        plan: Of a folder with a graph.
        vocabulary: Of the columns.
        threads: Of the session; None for one a core.
        runtime: What computes the body.

    Raises:
        ConfigError: Weights are missing.
    """
    weights, config = _weights(plan, vocabulary), _config(plan)
    width = config.output_size if isinstance(config, HybridConfig) else config.hidden_size
    tower = OnnxImageTower(
        plan.folder / GRAPH,
        weights,
        BodySizes(config.image_size, config.patches, width),
        head_name="image",
        matrix=PROJECTION,
        column_to_row=np.arange(weights[PROJECTION].shape[0]),
        threads=threads,
        runtime=runtime,
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

    file = plan.folder / GRAPH
    graph = image_graph(_own_weights(plan), plan.folder, _config(plan))
    file.write_bytes(graph.SerializeToString(deterministic=True))
    note_graphs(settings, [file], [weight_file(plan)], plan.vocabulary)


def _config(plan: ImagePlan) -> VitConfig | HybridConfig:
    if plan.body_kind not in ("vit", "hybrid"):
        raise ConfigError(
            f"the image body of {plan.folder} must be of kind 'vit' or 'hybrid' for an ONNX graph, "
            f"got {plan.body_kind!r}; load it with runtime='torch'."
        )
    return image_config(plan.body_kind, plan.body_settings)


def _own_weights(plan: ImagePlan) -> dict[str, StoredTensor]:
    """Weights in the folder itself, but for rows that replace those of a lent matrix."""
    checkpoint = Checkpoint(plan.folder)
    names = plan.names or {name: (name,) for name in checkpoint.names}
    others = {OWN_ROWS, OWN_IDS, OWN_SCALES}
    return stored_weights(
        checkpoint, {ours: it for ours, it in names.items() if ours not in others}
    )


def _weights(plan: ImagePlan, vocabulary: Vocabulary) -> dict[str, StoredTensor | SharedMatrix]:
    weights: dict[str, StoredTensor | SharedMatrix] = {**_own_weights(plan)}
    if plan.matrix_of is None:
        return weights
    text = read_plan(plan.matrix_of)
    lender = Checkpoint(text.folder)
    lent, _ = weight_names(text, text.document, lender)
    matrix = DECODER if DECODER in lent else WORDS
    own, places = own_rows(plan, vocabulary)
    weights[PROJECTION] = SharedMatrix(
        stored_weights(lender, {matrix: lent[matrix]})[matrix],
        matrix_rows(vocabulary),
        own,
        places,
    )
    return weights


def own_rows(
    plan: ImagePlan, vocabulary: Vocabulary
) -> tuple[StoredTensor | RoundedTensor | None, npt.NDArray[np.int64]]:
    """Rows that replace those of a lent matrix, None without, and their M columns.

    Raises:
        ConfigError: Rows of integers have no scales.
    """
    file = plan.folder / SAFETENSORS
    stored = stored_tensors(file)
    rows, scales = stored.get(OWN_ROWS), stored.get(OWN_SCALES)
    if rows is None:
        return None, np.zeros(0, np.int64)
    with safe_open(file, framework="np") as tensors:
        places = vocabulary.columns_of(tensors.get_tensor(OWN_IDS))
    if rows.dtype != "I8":
        return rows, places
    if scales is None:
        raise ConfigError(
            f"`{OWN_ROWS}` in {file} must have `{OWN_SCALES}`, since they are integers, got none; "
            "fetch the file again."
        )
    return RoundedTensor(rows, scales), places
