"""What a model folder is, for people: its layout and sides, and which keys of its files count."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vdr_db.checkpoints import keys
from vdr_db.checkpoints.folders import settings_of
from vdr_db.checkpoints.layouts import read_plan
from vdr_db.checkpoints.locate import locate_model
from vdr_db.checkpoints.plan import Plan, StaticPlan, TowerPlan
from vdr_db.errors import ConfigError

__all__ = ["describe_model"]

_FILES = {
    "config_sentence_transformers.json": keys.SENTENCE_TRANSFORMERS,
    "adapter_config.json": keys.ADAPTER,
    "tokenizer_config.json": keys.TOKENIZER,
}


def describe_model(
    name_or_folder: str | os.PathLike[str], revision: str | None = None
) -> dict[str, Any]:
    """What a folder says about its encoder; no weight is read.

    Args:
        name_or_folder: As in `SparseEncoder.from_pretrained`.
        revision: On the hub.

    Returns:
        `layout`, `head`, a line on each side, and the keys taken from each file; or `refused`, why
        the folder is none that this library computes.

    Raises:
        ConfigError: There is no such folder, and no such model on the hub.
    """
    folder, _ = locate_model(name_or_folder, revision)
    try:
        plan = read_plan(folder)
    except ConfigError as error:
        return {"folder": str(folder), "refused": str(error)}
    query = plan.query or plan.document
    return {
        "folder": str(folder),
        "layout": plan.layout,
        "head": plan.head,
        "documents": _side(plan, plan.document, plan.activation),
        "queries": _side(plan, query, plan.query_activation or plan.activation),
        "keys taken": _taken(folder),
    }


def _side(plan: Plan, part: TowerPlan | StaticPlan, activation: str) -> str:
    entry = plan.document_entry if part is plan.document else plan.query_entry
    kept = f"k={entry.k or 'all'}, {activation}"
    if isinstance(part, StaticPlan):
        return f"static weights of {(part.file or part.folder).name}, {kept}"
    by = "this library" if part.family else "transformers"
    kind = part.config.get("model_type", "an adapter's base model")
    more = [", as an adapter"] if part.adapter else []
    more += [", both directions"] if part.bidirectional else []
    more += [", own tokens only"] if part is plan.query and plan.query_gate else []
    return f"{kind} by {by}{''.join(more)}, {kept}"


def _taken(folder: Path) -> dict[str, str]:
    found = {}
    for file in sorted(folder.rglob("*.json")):
        table = _FILES.get(file.name)
        if file.name == "config.json" and "model_type" in settings_of(file):
            table = keys.BODY
        elif file.name.startswith("sentence_"):
            table = keys.TRANSFORMER
        if table is not None:
            taken = table.read_from(settings_of(file))
            found[str(file.relative_to(folder))] = ", ".join(taken) or "none"
    return found
