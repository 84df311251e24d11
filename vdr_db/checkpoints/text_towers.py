"""Towers of text encoders in torch, filled with the weights that a plan points to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch

from vdr_db.checkpoints.plan import Entry, Plan, StaticPlan, TowerPlan
from vdr_db.checkpoints.text_names import weight_names
from vdr_db.checkpoints.tower_plans import SPARSE_LINEAR
from vdr_db.checkpoints.weights import (
    Checkpoint,
    assign,
    check_layers,
    checked_device,
    checked_dtype,
    digest,
    named_weights,
    read_linear,
    refuse_unexpected,
)
from vdr_db.errors import ConfigError
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.families import Family, WeightNames
from vdr_db.towers.text import Tower
from vdr_db.towers.text_body import Body
from vdr_db.towers.text_head import make_head
from vdr_db.towers.token_weights import TokenWeights, WeigherTower

__all__ = ["build_towers"]

UNICOIL_DROPPED = ("[CLS]", "[PAD]")
"""Tokens whose weights uniCOIL's own code leaves out."""


def build_towers(
    plan: Plan,
    vocabulary: Vocabulary,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
) -> tuple[Tower, Tower | None, str]:
    """Towers of documents and of queries, one object when shared, and the digest of their weights.

    The digest is `""` for float32: it reads all weights, and can still be had later. Any other
    dtype rounds them, and all dtypes of a model are one model.

    Args:
        plan: Of a folder.
        vocabulary: Of the columns.
        device: As in `SparseEncoder.from_pretrained`.
        dtype: As in `SparseEncoder.from_pretrained`.

    Returns:
        None for the queries where their weights are static, which need no torch.

    Raises:
        ConfigError: Weights are missing, damaged or of another model; or this machine has no such
            device, or torch no such dtype.
    """
    kind, place = checked_dtype(dtype), checked_device(device)
    with torch.inference_mode(False):  # inference tensors could neither be trained nor stamped
        used: dict[Path, set[str]] = {}
        document = query = _tower(plan, plan.document, plan.document_entry, vocabulary, used)
        if isinstance(plan.query, TowerPlan):
            query = _tower(plan, plan.query, plan.query_entry, vocabulary, used)
            if _same_body(plan, plan.query):
                query.body = document.body
        for folder, names in used.items():
            refuse_unexpected(Checkpoint(folder), names, plan.ignored)
        known = ""
        if kind != torch.float32:
            known = digest(named_weights(document, query, plan.own_weights))
        for tower in {id(document): document, id(query): query}.values():
            tower.to(device=place, dtype=kind).eval()
    return document, None if isinstance(plan.query, StaticPlan) else query, known


def _same_body(plan: Plan, query: TowerPlan) -> bool:
    """Whether both sides name the same weights for their bodies."""
    document = plan.document
    places = [(where.folder or plan.folder, where.body_prefix) for where in (document, query)]
    return places[0] == places[1] and document.family is not None


def _tower(
    plan: Plan, where: TowerPlan, entry: Entry, columns: Vocabulary, used: dict[Path, set[str]]
) -> Tower:
    """A tower with its weights, float32 on the CPU; adds names of weights that were used.

    Models of transformers and heads of token weights answer the same calls as a `Tower`.
    """
    folder = where.folder or plan.folder
    if where.family is None:
        from vdr_db.checkpoints.hub_models import load_hub_model
        from vdr_db.towers.hub_model import HubModelTower

        model = load_hub_model(where, folder)
        try:
            tower = HubModelTower(model, columns, max_length=entry.max_length)
        except RuntimeError as error:
            raise ConfigError(
                f"the model in {folder} cannot run as its config.json has it: {error}; "
                "fetch the file again."
            ) from error
        tower.is_decoder = where.is_decoder
        return cast(Tower, tower)
    checkpoint = Checkpoint(folder)
    names = used.setdefault(folder, set())
    if plan.head == "token_weights":
        return cast(Tower, _build_weigher(where, where.family, columns, checkpoint, names))
    return _build(plan, where, where.family, columns, checkpoint, names)


def _build_weigher(
    where: TowerPlan,
    family: Family,
    columns: Vocabulary,
    checkpoint: Checkpoint,
    used: set[str],
) -> WeigherTower:
    """A tower that weighs a text's own tokens: the body, and one linear layer of one column."""
    config = family.body_config(where.config)
    check_layers(config.layers, checkpoint)
    prefix = where.body_prefix
    if not any(name.startswith(prefix) for name in checkpoint.names):
        prefix = ""
    names = {
        f"body.{ours}": theirs
        for ours, theirs in family.body_names(config.layers, prefix=prefix).items()
    }
    special: Iterable[int] = columns.special_ids if where.dropped is None else where.dropped
    file = checkpoint.folder / SPARSE_LINEAR
    if file.is_file():
        others = read_linear(file)
    else:  # uniCOIL, which keeps all of a text's tokens but the first
        special = frozenset(columns.id(token) for token in UNICOIL_DROPPED)
        stem = next((n for n in ("tok_proj", "tok_proto") if f"{n}.weight" in checkpoint.names), "")
        if not stem:
            raise ConfigError(
                f"the weights in {checkpoint.folder} lack tok_proj.weight, the head of uniCOIL; "
                "fetch the model again."
            )
        others = {part: checkpoint.tensor(f"{stem}.{part}").float() for part in ("weight", "bias")}
        used |= {f"{stem}.weight", f"{stem}.bias"}
    shape = tuple(others["weight"].shape)
    if shape != (1, config.hidden_size) or tuple(others["bias"].shape) != (1,):
        raise ConfigError(
            f"the head in {checkpoint.folder} must be of shape [1, {config.hidden_size}], got "
            f"{list(shape)}; it belongs to another model."
        )
    tower = WeigherTower(Body(config), TokenWeights(config, columns, special))
    head = {f"head.linear.{part}": tensor for part, tensor in others.items()}
    used |= assign(tower, checkpoint, names, others=head)
    return tower


def _build(
    plan: Plan,
    where: TowerPlan,
    family: Family,
    columns: Vocabulary,
    checkpoint: Checkpoint,
    used: set[str],
) -> Tower:
    """A tower with its weights, float32 on the CPU."""
    config = family.body_config(where.config)
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
        _refuse_headless(checkpoint, names, plan.head)
        used |= assign(tower, checkpoint, names)
    return tower


def _refuse_headless(checkpoint: Checkpoint, names: WeightNames, head: str) -> None:
    """Says it in one sentence where a body has no head at all: dense models are published so."""
    present = set(checkpoint.names)
    parts = [theirs for ours, theirs in names.items() if ours.startswith("head.")]
    if head == "mlm" and not any(present.intersection(theirs) for theirs in parts):
        raise ConfigError(
            f"{checkpoint.folder} must hold a masked language model, got a body without its head "
            f"(no {parts[0][0]}): it makes dense vectors, which have no sparse form."
        )
