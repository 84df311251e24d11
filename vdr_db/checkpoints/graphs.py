"""ONNX graphs of a model folder: written beside its weights, and opened as towers without torch.

A folder says in its settings file which weights its graphs were written for: the digest of their
header, that is names, shapes and places. Graphs of other weights are never run.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from vdr_db.checkpoints.plan import Plan, TowerPlan
from vdr_db.checkpoints.text_names import DECODER, WORDS, weight_names
from vdr_db.checkpoints.weights import SAFETENSORS, Checkpoint, refuse_unexpected
from vdr_db.errors import ConfigError, MissingExtraError
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.families import WeightNames
from vdr_db.towers.onnx import OnnxTextTower, OnnxTower
from vdr_db.towers.stored import StoredTensor, header_digest

__all__ = [
    "Runtime",
    "as_range",
    "chosen_runtime",
    "folder_obstacles",
    "graph_settings",
    "matrix_rows",
    "open_text_towers",
    "stored_weights",
    "trainable",
    "write_text_graphs",
]

if TYPE_CHECKING:
    from vdr_db.towers.torch_tower import TorchTower

TorchKind = TypeVar("TorchKind", bound="TorchTower")
AnyOnnx: TypeAlias = OnnxTower[Any, Any]

Runtime: TypeAlias = Literal["auto", "onnx", "torch"]


def graph_settings(files: Sequence[Path], vocabulary: str) -> dict[str, Any]:
    """What the settings file says about graphs.

    Args:
        files: The safetensors files that they point to.
        vocabulary: Kind of their columns.
    """
    return {"weights": [header_digest(file) for file in files], "vocabulary": vocabulary}


def chosen_runtime(
    asked: Runtime, obstacles: Mapping[str, str], *, device: object, folder: Path
) -> Literal["onnx", "torch"]:
    """The runtime of a folder.

    Args:
        asked: `"auto"` takes ONNX Runtime where it can be and nothing speaks for torch.
        obstacles: Why it cannot be ONNX Runtime: option or file -> the rest of a sentence.
        device: As in `SparseEncoder.from_pretrained`.
        folder: Of the model.

    Raises:
        ConfigError: The runtime is unknown, or cannot be used; the message says why and names the
            ways.
        MissingExtraError: It can only be torch, which is not installed.
    """
    if asked not in get_args(Runtime):
        raise ConfigError(f"`runtime` must be one of {get_args(Runtime)}, got {asked!r}.")
    if asked == "torch":
        return "torch"
    has_torch = importlib.util.find_spec("torch") is not None
    if not obstacles and (asked == "onnx" or not (device is None and has_torch and _has_cuda())):
        return "onnx"
    if asked == "auto" and has_torch:
        return "torch"
    why = "; ".join(f"{name} {reason}" for name, reason in obstacles.items())
    ways = f"write a folder with graphs with `vdr-db export {folder} --out FOLDER`"
    if asked == "onnx":
        raise ConfigError(f"{folder} cannot run on ONNX Runtime: {why}; {ways}, or use torch.")
    raise MissingExtraError(
        f"{folder} needs torch, which is not installed: {why}; either run pip install "
        f"'vdr-db[torch]', or, where torch is, {ways} and load that here."
    )


def _has_cuda() -> bool:
    """Whether torch would compute on a GPU; torch is imported only where there may be one."""
    if "torch" not in sys.modules and not Path("/proc/driver/nvidia").exists():
        return False
    import torch

    return torch.cuda.is_available()


def folder_obstacles(saved: object, files: Sequence[Path], vocabulary: str) -> dict[str, str]:
    """Why a folder cannot run on ONNX Runtime, apart from options.

    Args:
        saved: Entry `GRAPHS` of its settings file, or None.
        files: The safetensors files that graphs would point to.
        vocabulary: Kind of the columns.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return {"onnxruntime": "is not installed"}
    if not isinstance(saved, Mapping):
        return {"the folder": "holds no ONNX graphs"}
    if saved.get("vocabulary") != vocabulary:
        return {"`vocabulary`": f"must be {saved.get('vocabulary')!r}, that of its graphs"}
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        return {", ".join(missing): "is missing"}
    if saved.get("weights") != [header_digest(file) for file in files]:
        return {"its weights": "are not those that its graphs were written for"}
    return {}


def trainable(tower: TorchKind | AnyOnnx) -> TorchKind:
    """A tower of torch, as saving and training need it.

    Raises:
        ConfigError: ONNX Runtime computes it.
    """
    if isinstance(tower, OnnxTower):
        raise ConfigError(
            "an encoder must run on torch to be trained or saved, got one on ONNX Runtime; load it "
            "with runtime='torch'."
        )
    return tower


def stored_weights(checkpoint: Checkpoint, names: WeightNames) -> dict[str, StoredTensor]:
    """Weights of a tower by our names, as they lie in their file.

    Raises:
        ConfigError: One is missing, or in no safetensors file.
    """
    found: dict[str, StoredTensor] = {}
    for ours, options in names.items():
        stored = next((place for name in options if (place := checkpoint.stored(name))), None)
        if stored is None:
            raise ConfigError(
                f"the weights in {checkpoint.folder} lack `{options[0]}` in a safetensors file; "
                "fetch the model again, or save it anew with `save_pretrained`."
            )
        found[ours] = stored
    return found


def matrix_rows(vocabulary: Vocabulary) -> npt.NDArray[np.int64]:
    """Row of the word embeddings of each column, `[V]`."""
    return vocabulary.column_to_id.astype(np.int64)


def as_range(rows: npt.NDArray[np.int64]) -> slice | list[int]:
    """Ascending rows as graphs take them: a range where they are one."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == rows.size else rows.tolist()


def _sides(plan: Plan) -> dict[str, TowerPlan]:
    return {"document": plan.document, **({} if plan.query is None else {"query": plan.query})}


def _graph_file(folder: Path, side: str) -> Path:
    return folder / f"{side}.onnx"


def open_text_towers(
    plan: Plan, vocabulary: Vocabulary, threads: int | None
) -> tuple[OnnxTextTower, OnnxTextTower]:
    """Towers of documents and of queries, one object when shared; nothing is loaded yet.

    Args:
        plan: Of a folder with graphs.
        vocabulary: Of the columns.
        threads: Of a session; None for one a core.

    Raises:
        ConfigError: Weights are missing or of another model.
    """
    checkpoint = Checkpoint(plan.folder)
    used: set[str] = set()
    towers = {}
    for side, where in _sides(plan).items():
        names, _ = weight_names(plan, where, checkpoint)
        used |= {name for options in names.values() for name in options}
        weights = stored_weights(checkpoint, names)
        towers[side] = OnnxTextTower(
            _graph_file(plan.folder, side),
            weights,
            plan.family.body_config(where.config),
            head_name=plan.head,
            matrix=DECODER if DECODER in weights else WORDS,
            column_to_row=matrix_rows(vocabulary),
            threads=threads,
        )
    refuse_unexpected(checkpoint, used, plan.ignored)
    return towers["document"], towers.get("query", towers["document"])


def write_text_graphs(plan: Plan, vocabulary: Vocabulary) -> dict[str, Any]:
    """Writes the graphs of a folder beside its weights.

    Args:
        plan: Of the folder, whose weights are one safetensors file.
        vocabulary: Of the columns.

    Returns:
        What the settings file must say about them, under `GRAPHS`.

    Raises:
        ConfigError: A weight is missing, or a part of the model has no graph.
        MissingExtraError: `onnx` is not installed.
    """
    from vdr_db.towers.onnx_graphs import text_graph

    checkpoint = Checkpoint(plan.folder)
    rows = as_range(matrix_rows(vocabulary))
    for side, where in _sides(plan).items():
        names, _ = weight_names(plan, where, checkpoint)
        weights = stored_weights(checkpoint, names)
        config = plan.family.body_config(where.config)
        graph = text_graph(weights, plan.folder, config, plan.head, rows)
        _graph_file(plan.folder, side).write_bytes(graph.SerializeToString(deterministic=True))
    return graph_settings([plan.folder / SAFETENSORS], vocabulary.kind)
