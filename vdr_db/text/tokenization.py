"""Texts to token ids, packed one after the other.

A thin layer over the `tokenizers` library. It cuts nothing and adds nothing: special tokens and
truncation are the business of `vdr_db.encoders.batching`, which needs to know about both.
"""

from __future__ import annotations

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

__all__ = ["AnyTokenizer", "TextTokenizer", "TokenizedTexts"]

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
"""Any of these makes a folder hold a tokenizer."""

# The library keeps some 200 bytes a token until its answer is read: 50 MB for this many characters.
_CHARACTERS_AT_ONCE = 1 << 18


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

    def cut(self, chosen: npt.NDArray[np.int64], most: int) -> TokenizedTexts:
        """The first tokens of some texts.

        Args:
            chosen: `[B]` numbers of the texts.
            most: How many tokens of each.
        """
        counts = np.minimum(self.lengths[chosen], most)
        bounds = np.zeros(chosen.size + 1, np.int64)
        np.cumsum(counts, out=bounds[1:])
        source = np.repeat(self.cu_seqlens[chosen] - bounds[:-1], counts) + np.arange(bounds[-1])
        return TokenizedTexts(self.input_ids[source], bounds)


class TextTokenizer:
    """A tokenizer of the `tokenizers` library with what an encoder needs to know about it.

    Attributes:
        backend: The `tokenizers.Tokenizer`; neither cuts nor pads.
        settings: tokenizer_config.json of its folder, kept for saving.
        all_special_ids: Ids that mark structure, such as those of [CLS] and [PAD].
        prefix_ids: Ids put before a text.
        suffix_ids: Ids put after a text.
    """

    def __init__(
        self,
        backend: Tokenizer,
        *,
        settings: Mapping[str, Any] | None = None,
        lower_case: bool = False,
    ) -> None:
        """Takes over a tokenizer.

        Args:
            backend: Is changed: its own truncation and padding are switched off.
            settings: tokenizer_config.json, if there is one.
            lower_case: Lower-case texts first, whatever the tokenizer does on its own.
        """
        self.backend = backend
        self.backend.no_truncation()
        self.backend.no_padding()
        if lower_case:
            _lower_first(self.backend)
        self.settings = dict(settings or {"tokenizer_class": "PreTrainedTokenizerFast"})
        self.prefix_ids, self.suffix_ids = _frame(self.backend)
        self.all_special_ids = self._special_ids()

    @classmethod
    def from_folder(cls, folder: Path, *, lower_case: bool = False) -> TextTokenizer:
        """The tokenizer of a model folder.

        Args:
            folder: Holds tokenizer.json, or the vocabulary files of an older tokenizer.
            lower_case: As in the constructor.

        Raises:
            ConfigError: A file is missing or damaged.
        """
        file = folder / "tokenizer.json"
        settings = folder / "tokenizer_config.json"
        try:
            known = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
        except ValueError as error:
            raise ConfigError(f"{settings} must be JSON: {error}; fetch the file again.") from error
        if file.is_file():
            try:
                backend = Tokenizer.from_file(str(file))
            except Exception as error:  # the library raises plain `Exception`
                raise ConfigError(
                    f"{file} must be a tokenizer of the `tokenizers` library: {error}; "
                    "fetch the file again."
                ) from error
        elif any((folder / name).is_file() for name in TOKENIZER_FILES):
            backend = _convert(folder)
        else:
            raise ConfigError(
                f"{folder} must hold a tokenizer (tokenizer.json or vocab.txt), got neither; "
                "copy it there or pass `tokenizer=`."
            )
        return cls(backend, settings=known, lower_case=lower_case)

    @classmethod
    def of(cls, source: AnyTokenizer, *, lower_case: bool = False) -> TextTokenizer:
        """The tokenizer a caller handed in, as a copy.

        Args:
            source: A `TextTokenizer`, a `tokenizers.Tokenizer`, a fast tokenizer of transformers,
                or a folder.
            lower_case: As in the constructor.

        Raises:
            ConfigError: It is none of these.
        """
        if isinstance(source, TextTokenizer):
            return source
        if isinstance(source, (str, os.PathLike)):
            return cls.from_folder(Path(source), lower_case=lower_case)
        backend = getattr(source, "backend_tokenizer", source)
        if not isinstance(backend, Tokenizer):
            raise ConfigError(
                "`tokenizer` must be a folder, a tokenizers.Tokenizer or a fast tokenizer of "
                f"transformers, got {type(source).__name__}."
            )
        special = getattr(source, "special_tokens_map", {})
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings.update({k: str(v) for k, v in special.items() if k.endswith("_token")})
        copy = Tokenizer.from_str(backend.to_str())
        return cls(copy, settings=settings, lower_case=lower_case)

    def get_vocab(self) -> dict[str, int]:
        """Token text -> id, added tokens included."""
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def extra_length(self) -> int:
        """Number of special tokens put around a text."""
        return len(self.prefix_ids) + len(self.suffix_ids)

    def encode(self, texts: Sequence[str]) -> TokenizedTexts:
        """Own tokens of each text, uncut, without the special tokens around it.

        Args:
            texts: Checked texts.
        """
        pieces: list[npt.NDArray[np.int32]] = []
        for start, stop in _spans([len(text) for text in texts], _CHARACTERS_AT_ONCE):
            batch = list(texts[start:stop])
            for encoding in self.backend.encode_batch_fast(batch, add_special_tokens=False):
                pieces.append(np.array(encoding.ids, np.int32))
        cu_seqlens = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([piece.size for piece in pieces], out=cu_seqlens[1:])
        ids = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
        return TokenizedTexts(ids, cu_seqlens)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        self.backend.save(str(folder / "tokenizer.json"))
        settings = json.dumps(self.settings, indent=2, sort_keys=True)
        (folder / "tokenizer_config.json").write_text(settings + "\n", "utf-8")

    def _special_ids(self) -> list[int]:
        added = self.backend.get_added_tokens_decoder()
        special = {id for id, token in added.items() if token.special}
        special.update(self.prefix_ids, self.suffix_ids)
        for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
            token = self.settings.get(f"{name}_token")
            if isinstance(token, Mapping):
                token = token.get("content")
            id = self.backend.token_to_id(token) if isinstance(token, str) else None
            if id is not None:
                special.add(id)
        return sorted(special)


class _FastTokenizer(Protocol):
    """A fast tokenizer of transformers."""

    @property
    def backend_tokenizer(self) -> Tokenizer: ...


AnyTokenizer: TypeAlias = TextTokenizer | Tokenizer | _FastTokenizer | str | os.PathLike[str]
"""A tokenizer of this library, of `tokenizers` or of transformers, or the folder of one."""


def _lower_first(backend: Tokenizer) -> None:
    normalizer = backend.normalizer
    own = json.loads(backend.to_str())["normalizer"]
    if '"Lowercase"' in json.dumps(own) or (own or {}).get("lowercase"):
        return
    rest = [] if normalizer is None else [normalizer]
    backend.normalizer = NormalizerSequence([Lowercase(), *rest])


def _frame(backend: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
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


def _convert(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        backend = converted.backend_tokenizer
    except Exception as error:  # whatever transformers raises, the folder is what is wrong
        raise ConfigError(
            f"the tokenizer files in {folder} cannot be read: {error}; "
            "save the tokenizer anew as tokenizer.json."
        ) from error
    if not isinstance(backend, Tokenizer):
        raise ConfigError(
            f"the tokenizer in {folder} has no fast version; save it as tokenizer.json."
        )
    return backend


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
