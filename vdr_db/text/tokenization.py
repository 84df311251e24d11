"""Texts to token ids, packed one after the other.

A thin layer over the `tokenizers` library. It adds nothing and cuts nothing that is kept: special
tokens and truncation are the business of `vdr_db.encoders.batching`, which needs to know of both.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as NormalizerSequence

from vdr_db.errors import ConfigError
from vdr_db.text.excerpts import GROWTH, MARGIN, excerpt, is_local
from vdr_db.text.passages import Span
from vdr_db.text.slow import SlowTokenizer

__all__ = ["NAMED_TOKENS", "AnyTokenizer", "TextTokenizer", "TokenizedTexts"]

NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Keys of the special tokens in tokenizer_config.json."""

_SAVED = (*NAMED_TOKENS, "model_max_length", "truncation_side", "split_special_tokens")

# The library keeps some 200 bytes a token until its answer is read: 50 MB for this many characters.
_CHARACTERS_AT_ONCE = 1 << 18

# Excerpts of long texts; twice what English has, so that one excerpt mostly does.
_CHARACTERS_PER_TOKEN = 10


@dataclass(frozen=True)
class TokenizedTexts:
    """Own tokens of texts: nothing added, nothing cut.

    Attributes:
        input_ids: `[T]` int32, the ids of all texts one after the other.
        cu_seqlens: `[N + 1]` int64, text i is `input_ids[cu_seqlens[i]:cu_seqlens[i + 1]]`.
    """

    input_ids: npt.NDArray[np.int32]
    cu_seqlens: npt.NDArray[np.int64]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each text, `[N]`."""
        return np.diff(self.cu_seqlens)

    def cut(
        self, chosen: npt.NDArray[np.int64], most: int, *, left: bool = False
    ) -> TokenizedTexts:
        """The first tokens of some texts.

        Args:
            chosen: `[B]` numbers of the texts.
            most: How many tokens of each.
            left: Cut on the left: the last tokens instead.
        """
        counts = np.minimum(self.lengths[chosen], most)
        bounds = np.zeros(chosen.size + 1, np.int64)
        np.cumsum(counts, out=bounds[1:])
        starts = self.cu_seqlens[chosen + 1] - counts if left else self.cu_seqlens[chosen]
        source = np.repeat(starts - bounds[:-1], counts) + np.arange(bounds[-1])
        return TokenizedTexts(self.input_ids[source], bounds)


class TextTokenizer:
    """A tokenizer with what an encoder needs to know about it.

    Attributes:
        backend: The `tokenizers.Tokenizer`, or what stands for one; neither cuts nor pads.
        settings: tokenizer_config.json of its folder, with its special tokens.
        all_special_ids: Ids that mark structure, such as those of [CLS] and [PAD].
        prefix_ids: Ids put before a text.
        suffix_ids: Ids put after a text.
        cuts_left: Whether long texts lose their first tokens, not their last.
        special_as_text: Whether `[MASK]` and the like in a text are text, not special tokens.
    """

    def __init__(
        self,
        backend: Tokenizer | SlowTokenizer,
        *,
        settings: Mapping[str, Any] | None = None,
        lower_case: bool = False,
    ) -> None:
        """Takes over a tokenizer.

        Args:
            backend: Is changed: its own truncation and padding are switched off.
            settings: tokenizer_config.json, if there is one.
            lower_case: Lower-case texts first, whatever the tokenizer does on its own.

        Raises:
            ConfigError: A setting is impossible, or the tokenizer cannot lower-case.
        """
        self.backend = backend
        self.backend.no_truncation()
        self.backend.no_padding()
        if lower_case:
            _lower_first(self.backend)
        self.settings = dict(settings or {})
        side = self.settings.get("truncation_side") or "right"
        if side not in ("left", "right"):
            raise ConfigError(
                f"`truncation_side` of a tokenizer must be 'left' or 'right', got {side!r}."
            )
        self.cuts_left = side == "left"
        self.special_as_text = bool(self.settings.get("split_special_tokens", False))
        self.prefix_ids, self.suffix_ids = _frame(self.backend)
        self.all_special_ids = self._special_ids()
        self._plain: Tokenizer | SlowTokenizer | None = None
        self._is_local: bool | None = None

    def get_vocab(self) -> dict[str, int]:
        """Token text -> id, added tokens included."""
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def extra_length(self) -> int:
        """Number of special tokens put around a text."""
        return len(self.prefix_ids) + len(self.suffix_ids)

    def encode(
        self, texts: Sequence[str], *, special_as_text: bool | None = None, most: int | None = None
    ) -> TokenizedTexts:
        """Own tokens of each text, without the special tokens around it.

        Args:
            texts: Checked texts.
            special_as_text: Instead of the tokenizer's own `special_as_text`.
            most: How many tokens of a text the caller keeps. Much longer texts then get only some
                more than that, first or last ones by `cuts_left`, of which those to be kept are
                the same; this takes time and memory for what is kept, not for the text. None for
                all tokens.
        """
        as_text = self.special_as_text if special_as_text is None else special_as_text
        backend = self._as_text() if as_text else self.backend
        if most is None or all(len(text) <= 2 * _characters(most) for text in texts):
            return _joined(self._pieces(backend, texts))
        if self._is_local is None:
            self._is_local = is_local(self.backend)
        if not self._is_local:
            return _joined(self._pieces(backend, texts))
        pieces: dict[int, npt.NDArray[np.int32]] = {}
        wanted, characters = list(range(len(texts))), _characters(most)
        while wanted:
            parts = [excerpt(texts[i], characters, left=self.cuts_left) for i in wanted]
            found = self._pieces(backend, parts)
            pieces.update(zip(wanted, found, strict=True))
            wanted = [
                i
                for i, part, ids in zip(wanted, parts, found, strict=True)
                if len(part) < len(texts[i]) and ids.size <= most + MARGIN
            ]
            characters *= GROWTH
        return _joined([pieces[i] for i in range(len(texts))])

    def _pieces(
        self, backend: Tokenizer | SlowTokenizer, texts: Sequence[str]
    ) -> list[npt.NDArray[np.int32]]:
        """Token ids of each text."""
        pieces: list[npt.NDArray[np.int32]] = []
        for start, stop in _spans([len(text) for text in texts], _CHARACTERS_AT_ONCE):
            batch = list(texts[start:stop])
            for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
                pieces.append(np.array(encoding.ids, np.int32))
        return pieces

    def offsets(self, texts: Sequence[str]) -> list[list[Span] | None]:
        """(start, stop) of each own token in its text, uncut; `None` where that is not known."""
        backend = self._as_text() if self.special_as_text else self.backend
        if isinstance(backend, SlowTokenizer):
            return [None] * len(texts)
        found: list[list[Span] | None] = []
        for start, stop in _spans([len(text) for text in texts], _CHARACTERS_AT_ONCE):
            encodings = backend.encode_batch(list(texts[start:stop]), add_special_tokens=False)
            for text, encoding in zip(texts[start:stop], encodings, strict=True):
                found.append([_visible(text, *span) for span in encoding.offsets])
        return found

    def save(self, folder: Path) -> None:
        """Writes the files of a tokenizer that needs none of the settings it was built with."""
        if isinstance(self.backend, SlowTokenizer):
            self.backend.save(folder)
            return
        self.backend.save(str(folder / "tokenizer.json"))
        kept = {key: self.settings[key] for key in _SAVED if key in self.settings}
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
        if self.special_as_text:
            kept["split_special_tokens"] = True
        settings = json.dumps(kept, indent=2, sort_keys=True)
        (folder / "tokenizer_config.json").write_text(settings + "\n", "utf-8")

    def _as_text(self) -> Tokenizer | SlowTokenizer:
        """A copy that takes special tokens in a text for text, made when first needed."""
        if self._plain is None:
            plain = copy.copy(self.backend)
            if isinstance(self.backend, Tokenizer):
                plain = Tokenizer.from_str(self.backend.to_str())
            plain.encode_special_tokens = True
            self._plain = plain
        return self._plain

    def _special_ids(self) -> list[int]:
        added = self.backend.get_added_tokens_decoder()
        special = {id for id, token in added.items() if token.special}
        special.update(self.prefix_ids, self.suffix_ids)
        for name in NAMED_TOKENS:
            token = self.settings.get(name)
            if isinstance(token, Mapping):
                token = token.get("content")
            id = self.backend.token_to_id(token) if isinstance(token, str) else None
            if id is not None:
                special.add(id)
        return sorted(special)


def _joined(pieces: list[npt.NDArray[np.int32]]) -> TokenizedTexts:
    cu_seqlens = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum([piece.size for piece in pieces], out=cu_seqlens[1:])
    ids = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    return TokenizedTexts(ids, cu_seqlens)


def _characters(most: int) -> int:
    """Characters that so many tokens, and those next to a cut, mostly have."""
    return _CHARACTERS_PER_TOKEN * (most + MARGIN)


class _FastTokenizer(Protocol):
    """A fast tokenizer of transformers."""

    @property
    def backend_tokenizer(self) -> Tokenizer: ...


AnyTokenizer: TypeAlias = TextTokenizer | Tokenizer | _FastTokenizer | str | os.PathLike[str]
"""A tokenizer of this library, of `tokenizers` or of transformers, or the folder of one."""


def _lower_first(backend: Tokenizer | SlowTokenizer) -> None:
    if isinstance(backend, SlowTokenizer):
        raise ConfigError(
            "`do_lower_case` must be false for a tokenizer without tokenizer.json, got true; "
            "lower-case the texts before."
        )
    normalizer = backend.normalizer
    own = json.loads(backend.to_str())["normalizer"]
    if '"Lowercase"' in json.dumps(own) or (own or {}).get("lowercase"):
        return
    rest = [] if normalizer is None else [normalizer]
    backend.normalizer = NormalizerSequence([Lowercase(), *rest])


def _frame(backend: Tokenizer | SlowTokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids the tokenizer puts before and after a text."""
    own = backend.encode("a", add_special_tokens=False).ids
    framed = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(framed) - len(own) + 1):
        if own and framed[start : start + len(own)] == own:
            return tuple(framed[:start]), tuple(framed[start + len(own) :])
    raise ConfigError(
        f"the tokenizer must turn 'a' into its own ids with special ids around, got {own} and "
        f"{framed}; tokenizers that rewrite a text when special tokens are added are not supported."
    )


def _visible(text: str, start: int, stop: int) -> Span:
    # Byte-level tokenizers count the space before a word as a part of it.
    while start < stop and text[start].isspace():
        start += 1
    return start, stop


def _spans(sizes: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Neighbouring items in groups of at most `budget`, or of one item."""
    spans: list[tuple[int, int]] = []
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > budget:
            spans.append((start, i))
            start, total = i, 0
        total += size
    if len(sizes) > start:
        spans.append((start, len(sizes)))
    return spans
