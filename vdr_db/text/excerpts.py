"""Parts of long texts whose tokens are those of the whole: cut before tokenizing, not after.

A model keeps the first (or the last) few hundred tokens of a text; a tokenizer that is given 20 MB
takes half a minute and 2 GB to make millions. The tokens at the far end of an excerpt are those of
the whole text where a tokenizer is *local*: it splits at white space before it looks at words, its
normalizers look at characters and their neighbours, and excerpts end at white space. Tokens near
the cut are not taken: `MARGIN` more than are wanted must come, else the excerpt grows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

__all__ = ["MARGIN", "excerpt", "is_local"]

MARGIN = 64
"""Tokens next to the cut that are not trusted; also the longest added token, in characters."""

GROWTH = 4
"""How much longer an excerpt gets where too few tokens came."""

_LOCAL_NORMALIZERS = {
    *("BertNormalizer", "Lowercase", "StripAccents", "NFC", "NFD", "NFKC", "NFKD"),
}
_SPLITTERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_LOCAL_PRE_TOKENIZERS = {*_SPLITTERS, "ByteLevel", "Metaspace", "Punctuation", "Digits"}

_SPACE = re.compile(r"[ \t\n\r]")


def is_local(backend: object) -> bool:
    """Whether the tokens of a text are those of its parts between white space.

    Args:
        backend: A tokenizer; only those of `tokenizers` are known.
    """
    if not isinstance(backend, Tokenizer):
        return False
    parts = json.loads(backend.to_str())
    normalizers = _flat(parts.get("normalizer"), "normalizers")
    pre_tokenizers = _flat(parts.get("pre_tokenizer"), "pretokenizers")
    return (
        all(one["type"] in _LOCAL_NORMALIZERS for one in normalizers)
        and all(one["type"] in _LOCAL_PRE_TOKENIZERS for one in pre_tokenizers)
        and any(_splits(one) for one in pre_tokenizers)
        and all(len(token["content"]) <= MARGIN for token in parts.get("added_tokens") or ())
    )


def _flat(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a part of a tokenizer; a sequence of them may lie in a sequence."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part[key] for step in _flat(inner, key)]


def _splits(pre_tokenizer: Mapping[str, Any]) -> bool:
    kind = pre_tokenizer["type"]
    return (
        kind in _SPLITTERS
        or (kind == "ByteLevel" and bool(pre_tokenizer.get("use_regex", True)))
        or (kind == "Metaspace" and bool(pre_tokenizer.get("split", True)))
    )


def excerpt(text: str, characters: int, *, left: bool) -> str:
    """The beginning of a text, or its end, up to white space.

    Args:
        text: The text.
        characters: About how many are wanted; more come where there is no white space.
        left: The end instead of the beginning.

    Returns:
        The text itself where it has no more than twice as many.
    """
    while 2 * characters < len(text):
        # Between one and two times as many; white space stays outside, on the far side of the cut.
        if left:
            found = _SPACE.search(text, len(text) - 2 * characters, len(text) - characters)
            if found:
                return text[found.end() :]
        else:
            found = _SPACE.search(text, characters, 2 * characters)
            if found:
                return text[: found.start()]
        characters *= GROWTH
    return text
