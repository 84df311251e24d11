"""Text encoders written as folders: ours to read back, and sentence-transformers' to open."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdr_db.checkpoints.digests import DIGESTS, weight_digests
from vdr_db.checkpoints.export import Card, opens_elsewhere, part_folders, write_json, write_modules
from vdr_db.checkpoints.folders import written_folder
from vdr_db.checkpoints.layouts import OWN_FILE, OWN_FORMAT, OWN_WEIGHTS_FORMAT
from vdr_db.checkpoints.plan import tower_names
from vdr_db.checkpoints.tower_plans import SPARSE_LINEAR
from vdr_db.checkpoints.weights import SAFETENSORS, save_weights
from vdr_db.towers.families import FAMILIES

if TYPE_CHECKING:
    import torch

    from vdr_db.checkpoints.text import TextParts
    from vdr_db.towers.static import StaticTower
    from vdr_db.towers.text import Tower
    from vdr_db.towers.token_weights import WeigherTower

__all__ = ["save_text"]


def save_text(parts: TextParts, folder: str | os.PathLike[str], card: Card | None = None) -> None:
    """Writes a text encoder as a folder that `load_text` reads back, all of it or nothing.

    The folder is written beside its place and then renamed. An encoder saved there before is
    replaced; anything else is left alone. Weights keep their usual names: a shared `mlm` encoder
    opens with `transformers.AutoModelForMaskedLM`, and all open with sentence-transformers.

    Args:
        parts: What to save.
        folder: Where to.
        card: What its README.md says.

    Raises:
        ConfigError: The place holds something else, or cannot be written.
    """
    towers: dict[str, Any] = {"document": parts.document_tower, "query": parts.query_tower}
    entries = {"document": parts.document_entry, "query": parts.query_entry}
    settings: dict[str, Any] = {
        "format": OWN_FORMAT,
        "head": parts.document_tower.head_name,
        "activation": parts.activation,
        "query_activation": parts.query_activation,
        "vocabulary": parts.vocabulary.kind,
        "norm": parts.norm,
        "lexical": parts.lexical,
        "shared": parts.document_tower is parts.query_tower,
    }
    for side, entry in entries.items():
        settings[side] = {"max_length": entry.max_length, "k": entry.k, "prompt": entry.prompt}
    with written_folder(folder, OWN_FILE) as fresh:
        is_one_body = _is_one_body(parts)
        if is_one_body:
            parts.tokenizer.save(fresh)
            heads = {f"{side}.": tower for side, tower in towers.items()}
            body = _write_own(fresh, heads)
            for side in towers:
                settings[side] |= {**body, "head": f"{side}."}
        for side, place in {} if is_one_body else part_folders(parts).items():
            (fresh / place).mkdir(exist_ok=True)
            words = (parts.query_tokenizer if side == "query" else None) or parts.tokenizer
            words.save(fresh / place)
            settings[side] |= {"folder": place, **_write_tower(fresh / place, towers[side])}
        if parts.query_gate is not None:
            place = "query_2_SparseStaticEmbedding"
            (fresh / place).mkdir()
            (parts.query_tokenizer or parts.tokenizer).save(fresh / place)
            _write_static(fresh / place, parts.query_gate)
            settings["query"]["gate"] = place
        settings["query"]["tokenizer"] = parts.query_tokenizer is not None
        if parts.own_weights is not None:
            parts.own_weights.save(fresh)
            settings |= {
                "format": OWN_WEIGHTS_FORMAT,
                "own_weights": parts.own_weights.numbers(),
            }
        write_modules(fresh, parts, card)
        write_json(fresh / OWN_FILE, {**settings, DIGESTS: weight_digests(fresh)})


def _is_one_body(parts: TextParts) -> bool:
    """Whether two heads share a body, to be written once: where nobody else reads the folder."""
    towers: list[Any] = [parts.document_tower, parts.query_tower]
    bodies = [None if hasattr(tower, "model") else getattr(tower, "body", None) for tower in towers]
    is_one = bodies[0] is not None and bodies[0] is bodies[1] and towers[0] is not towers[1]
    return is_one and parts.query_tokenizer is None and not opens_elsewhere(parts)


def _write_tower(folder: Path, tower: Any) -> dict[str, Any]:
    """Weights and config of a tower; what is to be known to read them."""
    if tower.head_name == "static":
        _write_static(folder, tower)
        return {"static": True}
    if hasattr(tower, "model"):  # of transformers, which writes it
        tower.save_model(folder)
        return {"decoder": tower.is_decoder}
    if tower.head_name == "token_weights":
        return _write_weigher(folder, tower)
    return {**_write_own(folder, {"": tower}), "head": ""}


def _write_static(folder: Path, tower: StaticTower) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": tower.weights}, folder / SAFETENSORS, metadata={"format": "pt"})
    (folder / SAFETENSORS).chmod(0o644)


def _write_own(folder: Path, towers: Mapping[str, Tower]) -> dict[str, Any]:
    """Weights and config of towers with one body, by the prefix of their heads."""
    tower = next(iter(towers.values()))
    head, family = tower.head_name, FAMILIES[tower.config.family]
    config = family.to_hf_config(tower.config, masked_lm=head == "mlm")
    config["tie_word_embeddings"] = "head.decoder.weight" not in tower.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    for prefix, one in towers.items():
        names = tower_names(family, one.config.layers, head, family.body_prefix, prefix)
        for ours, tensor in one.named_parameters():
            for theirs in names[ours]:  # a bias goes by two names, and versions differ in which
                tensors[theirs] = tensor if theirs == names[ours][0] else tensor.clone()
    save_weights(tensors, folder / SAFETENSORS)
    write_json(folder / "config.json", config)
    return {"body": family.body_prefix}


def _write_weigher(folder: Path, tower: WeigherTower) -> dict[str, Any]:
    import torch

    family = FAMILIES[tower.config.family]
    names = family.body_names(tower.config.layers, prefix="")
    weights = {names[ours][0]: tensor for ours, tensor in tower.body.named_parameters()}
    save_weights(weights, folder / SAFETENSORS)
    write_json(folder / "config.json", family.to_hf_config(tower.config, masked_lm=False))
    linear = tower.head.linear
    assert linear.bias is not None
    head = {"weight": linear.weight.detach().cpu(), "bias": linear.bias.detach().cpu()}
    torch.save(head, folder / SPARSE_LINEAR)
    return {"body": "", "head": "", "dropped": tower.head.dropped}
