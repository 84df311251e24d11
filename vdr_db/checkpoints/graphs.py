"""ONNX graphs of a model folder: written beside its weights, and opened as towers without torch.

A folder says in its settings file which weights its graphs were written for: the digest of their
header, that is names, shapes and places. Graphs of other weights are never run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from vdr_db.checkpoints.digests import DIGESTS, graph_digests, note_digest
from vdr_db.checkpoints.folders import settings_of
from vdr_db.checkpoints.layouts import OWN_FILE, TEXT_PART, read_plan
from vdr_db.checkpoints.plan import GRAPHS, Plan, StaticPlan, TowerPlan
from vdr_db.checkpoints.text_names import DECODER, WORDS, weight_names
from vdr_db.checkpoints.tokenizers import read_tokenizer
from vdr_db.checkpoints.weights import (
    SAFETENSORS,
    Checkpoint,
    named_weights,
    refuse_unexpected,
)
from vdr_db.errors import ConfigError, MissingExtraError
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.families import HEADS, WeightNames
from vdr_db.towers.interface import LIBRARIES, GraphRuntime, Precision
from vdr_db.towers.onnx import OnnxTextTower, OnnxTower
from vdr_db.towers.stored import StoredTensor, header_digest

__all__ = [
    "Runtime",
    "add_graphs",
    "chosen_runtime",
    "folder_obstacles",
    "has_stored_towers",
    "matrix_rows",
    "note_graphs",
    "open_text_towers",
    "runtime_of",
    "stored_weights",
    "trainable",
]

if TYPE_CHECKING:
    from vdr_db.towers.torch_tower import TorchTower

TorchKind = TypeVar("TorchKind", bound="TorchTower")
AnyOnnx: TypeAlias = OnnxTower[Any, Any]

Runtime: TypeAlias = Literal["auto", "onnx", "openvino", "torch"]


def note_graphs(
    settings: Path, graphs: Sequence[Path], weights: Sequence[Path], vocabulary: str
) -> None:
    """Writes into a settings file what graphs there are.

    Args:
        settings: The file.
        graphs: Their files.
        weights: The safetensors files that they point to.
        vocabulary: Kind of their columns.
    """
    known = {"weights": [header_digest(file) for file in weights], "vocabulary": vocabulary}
    told = {GRAPHS: known, DIGESTS: graph_digests(settings, graphs)}
    content = json.dumps({**settings_of(settings), **told}, indent=2, sort_keys=True)
    settings.write_text(content + "\n", "utf-8")


def chosen_runtime(
    asked: Runtime, obstacles: Mapping[str, str], *, device: object, folder: Path
) -> Literal["onnx", "torch"]:
    """Whether a folder runs by its ONNX graphs or on torch.

    Args:
        asked: `"auto"` takes the graphs where that can be and nothing speaks for torch.
        obstacles: Why it cannot be the graphs: option or file -> the rest of a sentence.
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
    if not obstacles and (asked != "auto" or not (device is None and has_torch and _has_cuda())):
        return "onnx"
    if asked == "auto" and has_torch:
        return "torch"
    why = "; ".join(f"{name} {reason}" for name, reason in obstacles.items())
    ways = f"write a folder with graphs with `vdr-db export {folder} --out FOLDER`"
    if asked != "auto":
        raise ConfigError(
            f"{folder} cannot run on {LIBRARIES[asked]}: {why}; {ways}, or use torch."
        )
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
    """Why a folder cannot run by its graphs, apart from options.

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
            "an encoder must run on torch to be trained or saved, got one that runs by its graphs; "
            "load it with runtime='torch'."
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


def _sides(plan: Plan) -> dict[str, TowerPlan]:
    """Sides of a plan that have a tower of their own."""
    sides = {"document": plan.document, "query": plan.query}
    return {side: where for side, where in sides.items() if isinstance(where, TowerPlan)}


def _place(plan: Plan, where: TowerPlan) -> Path:
    return where.folder or plan.folder


def _graph_file(folder: Path, where: TowerPlan) -> Path:
    """Named after the weights that it is for, which other folders may borrow."""
    prefix = where.head_prefix or where.body_prefix
    return folder / f"{prefix.partition('.')[0] or 'model'}.onnx"


def runtime_of(
    plan: Plan,
    vocabulary: Vocabulary,
    asked: Runtime,
    obstacles: Mapping[str, str],
    device: object,
) -> Literal["onnx", "torch"]:
    """The runtime of a text encoder; arguments and errors as in `chosen_runtime`.

    Args:
        plan: Of its folder.
        vocabulary: Of the columns.
        asked: As in `chosen_runtime`.
        obstacles: What options speak against graphs.
        device: As in `SparseEncoder.from_pretrained`.
    """
    files = [_place(plan, where) / SAFETENSORS for where in _sides(plan).values()]
    obstacles = {
        **obstacles,
        **({"`head`": "starts without weights"} if plan.fresh else {}),
        **folder_obstacles(plan.graphs, list(dict.fromkeys(files)), vocabulary.kind),
    }
    if asked == "auto" and obstacles and isinstance(plan.query, StaticPlan):
        return "torch"  # without torch, queries work all the same, and documents say what they need
    return chosen_runtime(asked, obstacles, device=device, folder=plan.folder)


def has_stored_towers(plan: Plan) -> bool:
    """Whether `open_text_towers` finds all weights of a plan where they lie, graphs or not."""
    return plan.head in ("vdr", "mlm") and all(
        where.family is not None
        and not plan.fresh
        and (_place(plan, where) / SAFETENSORS).is_file()
        for where in _sides(plan).values()
    )


def open_text_towers(
    plan: Plan,
    vocabulary: Vocabulary,
    threads: int | None = None,
    precision: Precision = "float32",
    runtime: GraphRuntime = "onnx",
) -> dict[str, OnnxTextTower]:
    """Towers by side, `"query"` where it has one of its own; nothing is loaded yet.

    Args:
        plan: Of a folder with graphs.
        vocabulary: Of the columns.
        threads: Of a session; None for one a core.
        precision: One that the runtime has.
        runtime: What computes bodies.

    Raises:
        ConfigError: Weights are missing or of another model.
    """
    used: dict[Path, set[str]] = {}
    towers = {}
    for side, where in _sides(plan).items():
        assert where.family is not None
        folder = _place(plan, where)
        checkpoint = Checkpoint(folder)
        names, _ = weight_names(plan, where, checkpoint)
        known = {name for options in names.values() for name in options}
        used[folder] = used.get(folder, set()) | known
        weights = stored_weights(checkpoint, names)
        towers[side] = OnnxTextTower(
            _graph_file(folder, where),
            weights,
            where.family.body_config(where.config),
            head_name=plan.head,
            matrix=DECODER if DECODER in weights else WORDS,
            column_to_row=matrix_rows(vocabulary),
            threads=threads,
            precision=precision,
            runtime=runtime,
        )
    for folder, known in used.items():
        refuse_unexpected(Checkpoint(folder), known, plan.ignored)
    return towers


def add_graphs(folder: str | os.PathLike[str]) -> None:
    """Writes ONNX graphs into a folder that `save_text` wrote, beside its weights.

    Raises:
        ConfigError: The folder is of another kind, or a part of the model has no graph.
        MissingExtraError: `onnx` is not installed.
    """
    from vdr_db.towers.onnx_graphs import text_graph

    plan = read_plan(Path(folder))
    file = Path(folder) / OWN_FILE
    if not file.is_file():  # the folder of a `CrossModalEncoder`
        file = Path(folder) / TEXT_PART / OWN_FILE
    if not file.is_file():
        raise ConfigError(
            f"{folder} must be a folder that `save_pretrained` wrote, got the layout "
            f"{plan.layout}; export it to a folder of its own."
        )
    vocabulary = Vocabulary.from_tokenizer(read_tokenizer(plan.folder), plan.vocabulary)
    graphs, files = [], []
    for where in _sides(plan).values():
        if where.family is None or plan.head not in HEADS:
            raise ConfigError(
                f"{folder} must have a body of the BERT, DistilBERT or RoBERTa family and a head "
                f"over the vocabulary for ONNX graphs, got head {plan.head!r} on "
                f"{where.config.get('model_type')!r}; it runs on torch."
            )
        place = _place(plan, where)
        checkpoint = Checkpoint(place)
        weights = stored_weights(checkpoint, weight_names(plan, where, checkpoint)[0])
        config = where.family.body_config(where.config)
        graph = text_graph(weights, place, config, plan.head)
        graphs.append(_graph_file(place, where))
        graphs[-1].write_bytes(graph.SerializeToString(deterministic=True))
        files.append(place / SAFETENSORS)
    note_graphs(file, graphs, list(dict.fromkeys(files)), vocabulary.kind)
    if not isinstance(plan.query, StaticPlan):
        towers = open_text_towers(plan, vocabulary)
        document = towers["document"]
        query = towers.get("query", document)
        note_digest(file, named_weights(document, query, plan.own_weights))
