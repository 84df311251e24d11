"""Checkpoints of VDR's published code (vsearch/*, jzhoubu/*), of all three generations.

A `Retriever` holds two encoders, `encoder_q` and `encoder_p`. Generations differ in the keys of
config.json: `max_len`, `max_seq_len` or `sequence_length`; `model_id` or `base_model_id`; the type
in `type` of each encoder or, in 2023, in `alias` of the whole; 999 or, in 2023, 1000 skipped ids.
The body is a plain BERT whose sizes the config need not tell, so they are read off the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdr_db.checkpoints.folders import settings_of
from vdr_db.checkpoints.plan import Entry, Plan, TowerPlan
from vdr_db.checkpoints.weights import Checkpoint
from vdr_db.errors import ConfigError
from vdr_db.towers.families import FAMILIES

__all__ = ["is_upstream", "read_upstream"]

QUERY, DOCUMENT = "encoder_q", "encoder_p"
TEXT_TYPES = {"vdr": False, "vdr_crossmodal_text": True, "vdr_cm_text": True}
"""Type of a text encoder -> whether its vectors live in one space with those of images."""
IMAGE_TYPES = ("vdr_crossmodal_image", "vdr_cm_image")
DEFAULT_LENGTHS = {QUERY: 128, DOCUMENT: 256}
DEFAULT_K = 768
SHIFTS = {999: "from_999", 1000: "from_1000"}
BODY = "bert_model."
HEAD_WIDTH = 64


def is_upstream(folder: Path) -> bool:
    """Whether config.json names the two encoders."""
    file = folder / "config.json"
    return file.is_file() and bool({QUERY, DOCUMENT} & settings_of(file).keys())


def read_upstream(folder: Path) -> Plan:
    """The plan of a checkpoint; of a cross-modal one, its text encoder for both sides.

    Raises:
        ConfigError: Its encoders are of another type, or a setting is impossible.
    """
    file = folder / "config.json"
    config = settings_of(file)
    checkpoint = Checkpoint(folder)
    texts = _text_sides(file, config)
    present = [side for side in texts if any(n.startswith(f"{side}.") for n in checkpoint.names)]
    if not present:
        raise ConfigError(
            f"the weights in {folder} must have names that start with "
            f"{' or '.join(f'{side}.' for side in texts)}, got {checkpoint.names[:3]}; "
            "config.json belongs to another model."
        )
    is_shared = bool(config.get("shared_encoder"))
    query = QUERY if QUERY in present else DOCUMENT
    document = DOCUMENT if DOCUMENT in present and not is_shared else query
    settings = {side: config.get(side) or config[texts[0]] for side in (QUERY, DOCUMENT)}
    first = settings[query]
    is_crossmodal = TEXT_TYPES[_type_of(config, query)]
    entries = {side: _entry(file, config, side, settings[side]) for side in texts}
    if is_shared and len(entries) == 2:
        longest = max(entry.max_length or 0 for entry in entries.values())
        entries = {side: Entry(longest, entry.k) for side, entry in entries.items()}
    return Plan(
        folder=folder,
        layout="VDR upstream",
        head="vdr",
        activation="elu1p",
        vocabulary="ascii_from_999" if is_crossmodal else _kind(file, first),
        document=_tower(checkpoint, document, settings[document]),
        query=None if query == document else _tower(checkpoint, query, settings[query]),
        document_entry=entries.get(DOCUMENT) or entries[texts[0]],
        query_entry=entries.get(QUERY) or entries[texts[0]],
        norm=is_crossmodal or bool(first.get("norm", False)),
        tokenizer_id=str(_first(first, "model_id", "base_model_id", default="bert-base-uncased")),
        ignored=tuple(f"{side}." for side in (QUERY, DOCUMENT) if side not in (query, document)),
    )


def _first(settings: Mapping[str, Any], *keys: str, default: Any = None) -> Any:
    """The first setting that is there and not null."""
    return next((settings[key] for key in keys if settings.get(key) is not None), default)


def _type_of(config: Mapping[str, Any], side: str) -> str:
    encoder = config.get(side) or {}
    return str(_first(encoder, "type", default=_first(config, "alias", "type", default="vdr")))


def _text_sides(file: Path, config: Mapping[str, Any]) -> list[str]:
    types = {side: _type_of(config, side) for side in (QUERY, DOCUMENT) if config.get(side)}
    texts = [side for side, kind in types.items() if kind in TEXT_TYPES]
    foreign = sorted(set(types.values()) - {*TEXT_TYPES, *IMAGE_TYPES})
    if foreign or not texts:
        raise ConfigError(
            f"the encoders in {file} must be of type {sorted(TEXT_TYPES)}, got "
            f"{foreign or sorted(types.values())}; a DPR encoder, for one, makes dense vectors, "
            "which have no sparse form."
        )
    return texts


def _kind(file: Path, settings: Mapping[str, Any]) -> str:
    shift = _first(settings, "shift_vocab_num", default=999)
    if shift not in SHIFTS:
        raise ConfigError(
            f"`shift_vocab_num` in {file} must be one of {sorted(SHIFTS)}, got {shift!r}; "
            "no published checkpoint has another."
        )
    return SHIFTS[shift]


def _entry(file: Path, config: Mapping[str, Any], side: str, settings: Mapping[str, Any]) -> Entry:
    pooling = _first(settings, "pooling", default="max")
    if pooling != "max":
        raise ConfigError(
            f"`pooling` of {side} in {file} must be 'max', got {pooling!r}; "
            "no published checkpoint has another."
        )
    length = _first(settings, "max_len", "max_seq_len", "sequence_length")
    length = length or _first(config, "sequence_length", default=DEFAULT_LENGTHS[side])
    k = _first(settings, "topk", default=DEFAULT_K)
    if not isinstance(k, int) or k == 0 or k < -1:
        raise ConfigError(f"`topk` of {side} in {file} must be -1 or at least 1, got {k!r}.")
    return Entry(max_length=int(length), k=None if k == -1 else k)


def _tower(checkpoint: Checkpoint, side: str, settings: Mapping[str, Any]) -> TowerPlan:
    prefix = f"{side}.{BODY}"
    word = f"{prefix}embeddings.word_embeddings.weight"
    positions = f"{prefix}embeddings.position_embeddings.weight"
    layer = f"{prefix}encoder.layer."
    up = f"{layer}0.intermediate.dense.weight"
    missing = [name for name in (word, positions, up) if name not in checkpoint.names]
    if missing:
        raise ConfigError(
            f"the weights in {checkpoint.folder} lack {', '.join(missing)}; fetch the model again."
        )
    layers = {n.removeprefix(layer).split(".")[0] for n in checkpoint.names if n.startswith(layer)}
    rows, width = checkpoint.shape(word)
    config = {key: settings[key] for key in ("hidden_act", "layer_norm_eps") if key in settings}
    config |= {
        "model_type": "bert",
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        # not to be seen from weights, and 64 columns each in every published BERT
        "num_attention_heads": settings.get("num_attention_heads", max(1, width // HEAD_WIDTH)),
        "intermediate_size": checkpoint.shape(up)[0],
        "max_position_embeddings": checkpoint.shape(positions)[0],
    }
    return TowerPlan(config, prefix, f"{side}.", family=FAMILIES["bert"])
