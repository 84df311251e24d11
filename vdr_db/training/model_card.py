"""The card of a trained model: what it is, what it saw, how good it is, how to make it again."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vdr_db.training.settings import TrainConfig
from vdr_db.training.trainer import Outcome
from vdr_db.version import __version__

__all__ = ["write_model_card"]

CARD = "README.md"
NEW_LINE = "\n"  # Python 3.10 allows no backslash within the braces of an f-string
_KINDS = (
    ("SparseEncoder", "A sparse text encoder for `vdr_db`: texts become weights of word pieces."),
    (
        "CrossModalEncoder",
        "A sparse encoder of texts and images for `vdr_db`: both become weights of the same word "
        "pieces.",
    ),
)
"""Class and first sentence, without images and with them."""
_PROJECTIONS = {
    "text": "the text side's matrix",
    "own": "its own",
    "kept": "the text side's matrix, but for rows of its own of words that training texts keep",
}


def write_model_card(
    folder: Path,
    config: TrainConfig,
    outcome: Outcome,
    *,
    command: str,
    name: str = "",
    notes: Sequence[str] = (),
    quality: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Writes `README.md` into the model's folder.

    Args:
        folder: Of the model.
        config: What it was trained with.
        outcome: How the run ended.
        command: What was typed.
        name: That it is loaded by; empty for its folder's.
        notes: Paragraphs on licence and limits.
        quality: Collection -> figures, measured afterwards.

    Returns:
        The card.
    """
    run, name = config.run, name or folder.name
    kind, sentence = _KINDS[config.image is not None]
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    made = {
        "seed": run.seed,
        "steps": outcome.steps,
        "queries or pairs a step": run.batch_size * run.accumulate,
        "time": f"{outcome.seconds / 60:.0f} minutes",
        "machine": machine or f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": f"vdr_db {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
    }
    files = [f"| {Path(item.path).name} | {item.weight:g} |" for item in config.data.train]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    text = f"""# {name}

{sentence}

```python
from vdr_db import {kind}

encoder = {kind}.from_pretrained("{name}")
```

## What it is

{_table({**_parts(config), "size": f"{size / 1e6:.1f} MB"})}

## What it saw

| file | weight |
|---|---|
{NEW_LINE.join(files)}

Objective `{config.loss.objective}`; teachers: {_teachers(config)}.

## How good it is

{_quality(outcome, config, quality)}

## Make it again

```
{command}
```

{_table(made)}

Settings, as JSON:

```json
{json.dumps(_portable(config), indent=1)}
```
"""
    card = folder / CARD
    card.write_text(text + "".join(f"\n{note}\n" for note in notes), "utf-8")
    return card


def _parts(config: TrainConfig) -> dict[str, Any]:
    model = config.model
    parts = {
        "start": _short(model.start),
        "head": model.head or "the start's",
        "activation": model.activation or "the start's",
        "kept per document / query": f"{model.k} / {model.query_k}",
        "weights": model.save_dtype,
    }
    image = config.image
    if image is None:
        return {**parts, "towers": "one, shared" if model.shared else "two"}
    body = f"{image.layers} layers of width {image.hidden_size} on patches of {image.patch_size}"
    if image.body == "hybrid":
        body += " pixels out of a frozen convolutional stem"
    return {
        **parts,
        "text side": "trained" if image.train_text else "frozen",
        "image side": _short(image.start) or body,
        "images": f"{image.size} x {image.size} pixels",
        "kept per image": image.k,
        "projection": _PROJECTIONS[image.projection],
    }


def _table(rows: Mapping[str, Any]) -> str:
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return NEW_LINE.join(lines)


def _teachers(config: TrainConfig) -> str:
    named = [
        f"{item.kind} {Path(item.path).name} (weight {item.weight:g})".replace("  ", " ")
        for item in config.teachers
    ]
    return ", ".join(named) or ("see below" if config.loss.imitation else "none")


def _quality(
    outcome: Outcome, config: TrainConfig, quality: Mapping[str, Mapping[str, float]] | None
) -> str:
    lines: list[str] = []
    if outcome.first:
        held = Path(config.evaluation.folder).name
        lines += [
            f"Held-out part `{held}`, never trained on: nDCG@10 {outcome.first['ndcg@10']:.3f} "
            f"before training, {outcome.best:.3f} at step {outcome.best_step}.",
        ]
    if quality:
        names = list(dict.fromkeys(name for row in quality.values() for name in row))
        lines += ["", f"| collection | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        for collection, row in quality.items():
            cells = (f"{row[name]:.3f}" if name in row else "" for name in names)
            lines.append(f"| {collection} | {' | '.join(cells)} |")
    return NEW_LINE.join(lines) or "Not measured."


def _portable(config: TrainConfig) -> dict[str, Any]:
    """Settings without the folders of one machine."""
    settings = config.to_dict()
    for item in settings["data"]["train"]:
        item["path"] = Path(item["path"]).name
    for item in settings["teachers"]:
        item["path"] = _short(item["path"])
    settings["model"]["start"] = _short(settings["model"]["start"])
    settings["evaluation"]["folder"] = Path(settings["evaluation"]["folder"]).name
    image = settings["image"]
    if image is None:
        del settings["image"]
        return settings
    for name in ("start", "stem", "cache"):
        image[name] = _short(image[name])
    return settings


def _short(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() else path
