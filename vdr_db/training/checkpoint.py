"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder `checkpoint-STEP` with one file, written beside its place and then renamed,
so a process killed at any moment leaves the one before it, whole. Random numbers need no state: the
order of examples is a function of seed and epoch, dropout of seed, step and rank.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from vdr_db.errors import ConfigError
from vdr_db.training.image_settings import ImageConfig
from vdr_db.training.settings import FileConfig, TeacherConfig, TrainConfig

__all__ = ["Position", "find_checkpoint", "load_checkpoint", "save_checkpoint"]

_NAME = re.compile(r"checkpoint-(\d+)")
_FILE = "state.pt"
_FORMAT = 1
KEPT = 2
"""Checkpoints of a run that are kept, the newest."""


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        step: Steps done.
        epoch: Of the data.
        batch: Global batches consumed in this epoch.
        best: Best nDCG@10 so far, -1 before the first evaluation.
        best_step: When it was reached.
        seconds: Of training so far, all processes that took part in turn.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float = -1.0
    best_step: int = 0
    seconds: float = 0.0


def save_checkpoint(
    output: Path, position: Position, state: dict[str, Any], settings: dict[str, Any]
) -> Path:
    """Writes position, state dicts by name and settings, then drops the oldest beyond `KEPT`.

    Raises:
        ConfigError: The folder cannot be written.
    """
    target = output / f"checkpoint-{position.step}"
    fresh = output / f".checkpoint-{position.step}.new"
    content = {
        "format": _FORMAT,
        "position": vars(position),
        "state": state,
        "settings": settings,
    }
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        with open(fresh / _FILE, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    except OSError as error:
        raise ConfigError(
            f"checkpoint {target} cannot be written: {error}; choose an output folder with room."
        ) from error
    for _, old in _checkpoints(output)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def find_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    found = _checkpoints(output)
    return found[-1][1] if found else None


def load_checkpoint(
    folder: Path, settings: dict[str, Any], device: torch.device
) -> tuple[Position, dict[str, Any]]:
    """Position and state of a checkpoint, for a run with these settings.

    Raises:
        ConfigError: It is damaged, or was made with other settings.
    """
    try:
        content = torch.load(folder / _FILE, map_location=device, weights_only=True)
    except Exception as error:  # whatever torch raises, the file is what is wrong
        raise ConfigError(
            f"checkpoint {folder} cannot be read: {error}; remove it to go on from the one before."
        ) from error
    if content.get("format") != _FORMAT:
        raise ConfigError(f"checkpoint {folder} is of another version; start the run anew.")
    changed = _differences(content["settings"], settings)
    if changed:
        raise ConfigError(
            f"checkpoint {folder} was made with other settings ({'; '.join(changed)}); give them "
            "back, or choose another output folder."
        )
    names = {field.name for field in fields(Position)}
    position = {name: value for name, value in content["position"].items() if name in names}
    return Position(**position), content["state"]


def _checkpoints(output: Path) -> list[tuple[int, Path]]:
    if not output.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in output.iterdir()]
    whole = [(int(match[1]), path) for match, path in found if match and (path / _FILE).is_file()]
    return sorted(whole)


# What may change between two halves of a run without changing what was learnt so far; a run of more
# steps goes on with the learning rate that its schedule has there.
_FREE = {
    "run.steps",
    "run.epochs",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.log_every",
    "run.threads",
    "data.prefetch",
    "image.cache",
}
# What settings meant that older versions had: checkpoints that hold these values can go on.
_GONE = {
    "model.encode_query_max_length": None,
    "model.encode_lexical": False,
    "data.train.split": "train",
    "teachers.k": 256,
    "teachers.query_k": 128,
    "teachers.query_activation": None,
    "teachers.query_scale": 1.0,
    "teachers.length_power": 0.0,
    "teachers.length_norm": 1.0,
    "teachers.lexical_query": 0.0,
    "teachers.lexical_document": 0.0,
    "teachers.mean_length": None,
    "evaluation.split": "test",
    "evaluation.patience": 0,
    "loss.l1_query": 0.0,
    "loss.l1_document": 0.0,
    "image.freeze_stem": True,
    "image.text_side": "query",
    "image.dense_weight": 0.0,
    "image.dense_start": "",
    "image.dense_temperature": 0.05,
    "image.teacher": "",
    "image.teacher_weight": 1.0,
}
_DEFAULTS: dict[str, object] = _GONE | {
    f"{section}.{name}": value
    for section, settings in {
        **vars(TrainConfig()),
        "data.train": FileConfig(),
        "teachers": TeacherConfig(),
        "image": ImageConfig(),
    }.items()
    if is_dataclass(settings)
    for name, value in vars(settings).items()
}


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What is not the same, a setting that one side lacks taken for its default."""
    if isinstance(old, dict) and isinstance(new, dict):
        changes = []
        for key in sorted({*old, *new}):
            name = f"{where}.{key}" if where else key
            default = _DEFAULTS.get(name)
            changes += _differences(old.get(key, default), new.get(key, default), name)
        return changes
    are_lists = isinstance(old, (list, tuple)) and isinstance(new, (list, tuple))
    if are_lists and len(old) == len(new):
        pairs = zip(old, new, strict=True)
        return [change for pair in pairs for change in _differences(*pair, where)]
    return [] if where in _FREE or old == new else [f"{where} was {old!r}, now {new!r}"]
