"""Towers of text encoders in torch, filled with the weights that a plan points to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vdr_db.checkpoints.plan import Plan, TowerPlan, tower_names
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
    body_prefix = where.body_prefix
    present = set(checkpoint.names)
    if plan.fresh and not any(name.startswith(body_prefix) for name in present):
        body_prefix = ""  # the body alone, without the prefix of a masked language model
    names = tower_names(plan.family, config.layers, plan.head, body_prefix, where.head_prefix)
    tied = True
    if plan.head == "mlm":
        word, decoder = names["body.embeddings.word.weight"], names["head.decoder.weight"]
        tied = _is_tied(checkpoint, word[0], decoder[0], where.config)
        if tied:
            names["body.embeddings.word.weight"] = (*word, *decoder)
            del names["head.decoder.weight"]
    tower = Tower(Body(config), make_head(plan.head, config, columns, tied=tied))
    if plan.fresh:
        width = config.hidden_size
        fresh = {"head.norm.weight": torch.ones(width), "head.norm.bias": torch.zeros(width)}
        names = {ours: theirs for ours, theirs in names.items() if ours not in fresh}
        used |= assign(tower, checkpoint, names, others=fresh)
        used |= {name for name in present if not name.startswith(body_prefix)}
    else:
        used |= assign(tower, checkpoint, names)
    return tower


def _is_tied(checkpoint: Checkpoint, word: str, decoder: str, config: Mapping[str, Any]) -> bool:
    """Whether the decoder is the word embeddings: what the weights say counts, then the config."""
    present = set(checkpoint.names)
    if not {word, decoder} <= present:
        return bool(config.get("tie_word_embeddings", True))
    if checkpoint.shape(word) != checkpoint.shape(decoder):
        return False
    return torch.equal(checkpoint.tensor(word), checkpoint.tensor(decoder))
