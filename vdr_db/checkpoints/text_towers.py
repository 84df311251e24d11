"""Towers of text encoders in torch, filled with the weights that a plan points to."""

from __future__ import annotations

import torch

from vdr_db.checkpoints.plan import Plan, TowerPlan
from vdr_db.checkpoints.text_names import weight_names
from vdr_db.checkpoints.weights import (
    Checkpoint,
    assign,
    checked_device,
    checked_dtype,
    digest,
    named_weights,
    refuse_unexpected,
)
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.text import Tower
from vdr_db.towers.text_body import Body
from vdr_db.towers.text_head import make_head

__all__ = ["build_towers"]


def build_towers(
    plan: Plan,
    vocabulary: Vocabulary,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
) -> tuple[Tower, Tower, str]:
    """Towers of documents and of queries, one object when shared, and the digest of their weights.

    The digest is `""` for float32: it reads all weights, and can still be had later. Any other
    dtype rounds them, and all dtypes of a model are one model.

    Args:
        plan: Of a folder.
        vocabulary: Of the columns.
        device: As in `SparseEncoder.from_pretrained`.
        dtype: As in `SparseEncoder.from_pretrained`.

    Raises:
        ConfigError: Weights are missing, damaged or of another model; or this machine has no such
            device, or torch no such dtype.
    """
    kind, place = checked_dtype(dtype), checked_device(device)
    with torch.inference_mode(False):  # inference tensors could neither be trained nor stamped
        checkpoint = Checkpoint(plan.folder)
        used: set[str] = set()
        document = query = _build(plan, plan.document, vocabulary, checkpoint, used)
        if plan.query is not None:
            query = _build(plan, plan.query, vocabulary, checkpoint, used)
        refuse_unexpected(checkpoint, used, plan.ignored)
        known = "" if kind == torch.float32 else digest(named_weights(document, query))
        for tower in {id(document): document, id(query): query}.values():
            tower.to(device=place, dtype=kind).eval()
    return document, query, known


def _build(
    plan: Plan,
    where: TowerPlan,
    columns: Vocabulary,
    checkpoint: Checkpoint,
    used: set[str],
) -> Tower:
    """A tower with its weights, float32 on the CPU."""
    config = plan.family.body_config(where.config)
    names, body_prefix = weight_names(plan, where, checkpoint)
    tied = "head.decoder.weight" not in names
    tower = Tower(Body(config), make_head(plan.head, config, columns, tied=tied))
    if plan.fresh:
        width = config.hidden_size
        fresh = {"head.norm.weight": torch.ones(width), "head.norm.bias": torch.zeros(width)}
        names = {ours: theirs for ours, theirs in names.items() if ours not in fresh}
        used |= assign(tower, checkpoint, names, others=fresh)
        used |= {name for name in checkpoint.names if not name.startswith(body_prefix)}
    else:
        used |= assign(tower, checkpoint, names)
    return tower
