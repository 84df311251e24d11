"""What of an encoder changes its vectors, apart from its weights, as a flat list of settings.

Derived from the parts an encoder is built of, whatever they are: an option that parts get is in the
stamps of stores without a word here. Both runtimes are built of the same parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from vdr_db.text.slow import SlowTokenizer
from vdr_db.text.tokenization import TextTokenizer
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.static import StaticTower

__all__ = ["settings_of_parts"]

_NAMES = ("model", "revision", "digest")
"""Parts that say where an encoder is from; the digest of the weights has a field of its own."""

_TRAINED_WITH = ("hidden_dropout", "attention_dropout")
_OF_NO_VECTOR = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
_LONGEST = 120
"""Characters of a setting that is kept as it is; of longer ones, the digest."""


def settings_of_parts(parts: Mapping[str, object]) -> dict[str, str]:
    """Dotted name -> JSON text of every setting; what is unset, off or empty is left out.

    Args:
        parts: Of an encoder by name, and whatever else it has been told.
    """
    told = dict(parts)
    if told.get("document_tower") is told.get("query_tower"):
        told["query_tower"] = None
    found: dict[str, str] = {}
    for name, value in told.items():
        if name not in _NAMES:
            _flatten(name, _plain(value), found)
    return found


def _flatten(name: str, value: Any, found: dict[str, str]) -> None:
    if isinstance(value, dict) and len(value) <= 64:
        for key in value:
            _flatten(f"{name}.{key}", value[key], found)
    elif not (value is None or value is False or value in ("", [], {})):
        text = json.dumps(value, sort_keys=True)
        found[name] = text if len(text) <= _LONGEST else _digest(text.encode())


def _plain(value: Any) -> Any:
    """JSON types that differ where vectors may."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, np.ndarray):
        return _digest(f"{value.dtype} {value.shape} ".encode() + value.tobytes())
    if isinstance(value, Mapping):
        kept = ((str(key), one) for key, one in value.items() if key not in _OF_NO_VECTOR)
        return {key: _plain(one) for key, one in sorted(kept)}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, TextTokenizer):
        return _of_tokenizer(value)
    if isinstance(value, Vocabulary):
        return {"special_ids": sorted(value.special_ids)}
    if hasattr(value, "head_name"):
        return _of_tower(value)
    if is_dataclass(value):
        names = [one.name for one in fields(value) if one.name not in _TRAINED_WITH]
        return {name: _plain(getattr(value, name)) for name in names}
    return {name: _plain(one) for name, one in vars(value).items() if not name.startswith("_")}


def _of_tower(tower: Any) -> dict[str, Any]:
    """A tower but for its weights; those of static ones count, as gates have no other digest."""
    told: dict[str, Any] = {"head": tower.head_name}
    if isinstance(tower, StaticTower):
        told["weights"] = tower.weights
    else:
        # Those of images tell their sizes among the constants.
        told["config"] = None if tower.head_name == "image" else tower.config
        told["constants"] = getattr(tower, "constants", None)
    return {name: _plain(one) for name, one in told.items()}


def _of_tokenizer(tokenizer: TextTokenizer) -> dict[str, Any]:
    backend = tokenizer.backend
    told: dict[str, Any] = {
        "prefix_ids": tokenizer.prefix_ids,
        "suffix_ids": tokenizer.suffix_ids,
        "cuts_left": tokenizer.cuts_left,
        "special_as_text": tokenizer.special_as_text,
    }
    if isinstance(backend, SlowTokenizer):
        plain = (str, int, float, bool)
        arguments = getattr(backend.source, "init_kwargs", {})
        told["class"] = type(backend.source).__name__
        told["arguments"] = {k: v for k, v in arguments.items() if isinstance(v, plain)}
        told["arguments"].pop("name_or_path", None)
    else:
        whole = json.loads(backend.to_str())
        if isinstance(whole["model"].get("vocab"), dict):
            del whole["model"]["vocab"]  # words and their ids have a field of their own
        # Cutting and padding are switched off, and nothing is decoded.
        for name in ("normalizer", "pre_tokenizer", "post_processor", "model", "added_tokens"):
            told[name] = _pruned(whole.get(name))
    return {name: _plain(value) for name, value in told.items()}


def _pruned(value: Any) -> Any:
    """Without what is unset or off, which other versions of the library do not write.

    Long lists, such as pieces with their scores, are digests already: walking them takes long.
    """
    if isinstance(value, dict):
        kept = {key: _pruned(one) for key, one in value.items()}
        return {key: one for key, one in kept.items() if one is not None and one is not False}
    if isinstance(value, list) and len(value) > 64:
        return _digest(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return value


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
