"""Tokenizers that the `tokenizers` library does not have, behind the calls that others get it by.

transformers keeps some in Python: Japanese ones, which cut words with a dictionary first, and
whatever a caller wrote on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["SlowTokenizer"]


@dataclass(frozen=True)
class _Encoding:
    """Ids of a text; where each stands in it is not known."""

    ids: list[int]

    @property
    def offsets(self) -> list[tuple[int, int]]:
        return [(-1, -1)] * len(self.ids)


class SlowTokenizer:
    """A Python tokenizer of transformers in the place of a `tokenizers.Tokenizer`.

    Attributes:
        source: The tokenizer of transformers.
        encode_special_tokens: Whether special tokens in a text are text.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self.encode_special_tokens = False

    def no_truncation(self) -> None:
        """Nothing to switch off."""

    def no_padding(self) -> None:
        """Nothing to switch off."""

    def encode(self, text: str, add_special_tokens: bool = True) -> _Encoding:
        """Ids of one text."""
        ids = self.source.encode(
            text,
            add_special_tokens=add_special_tokens,
            split_special_tokens=self.encode_special_tokens,
        )
        return _Encoding(ids)

    def encode_batch_fast(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[_Encoding]:
        """Ids of each text."""
        return [self.encode(text, add_special_tokens) for text in texts]

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Token text -> id."""
        found: dict[str, int] = self.source.get_vocab()
        return found

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        """Id -> added token."""
        found: dict[int, Any] = self.source.added_tokens_decoder
        return found

    def token_to_id(self, token: str) -> int | None:
        """Id of a token text, None where there is no such token."""
        return self.get_vocab().get(token)

    def save(self, folder: Path) -> None:
        """Writes the files that transformers reads it from."""
        self.source.save_pretrained(folder)
