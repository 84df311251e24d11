"""`Vocabulary`: which token ids a model computes, and what they are called.

A head computes one column per kept token id; everything outside the head speaks token ids. This
module is the only place that converts between the two.

Kinds (the first text column is what published checkpoints use):

| kind               | kept token ids                          | BERT uncased columns |
|--------------------|-----------------------------------------|----------------------|
| `all`              | every id                                | 30,522               |
| `from_999`         | ids from 999 (`!` is 999)               | 29,523               |
| `from_1000`        | ids from 1000, checkpoints of 2023      | 29,522               |
| `ascii_from_999`   | ids from 999 whose token is pure ASCII  | 27,623               |

Source: Zhou et al., "Retrieval-based Disentangled Representation Learning with Natural Language
Supervision", ICLR 2024, and its published checkpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vdr_db.budget import BUDGET
from vdr_db.errors import ConfigError, InputError, ShapeError
from vdr_db.sparse import SparseRows

__all__ = ["KINDS", "Vocabulary", "is_piece"]

IdArray = npt.NDArray[np.int32]

KINDS: Mapping[str, Callable[[Sequence[str]], Sequence[int]]] = {
    "all": lambda tokens: range(len(tokens)),
    "from_999": lambda tokens: range(999, len(tokens)),
    "from_1000": lambda tokens: range(1000, len(tokens)),
    "ascii_from_999": lambda tokens: [id for id in range(999, len(tokens)) if tokens[id].isascii()],
}

# Byte-level BPE tokenizers write a leading space as this letter, sentence-piece ones as the bar.
_BYTE_LEVEL_SPACE = "\u0120"
_SENTENCE_PIECE_SPACE = "\u2581"
_CONTINUATION = "##"


class _Tokens(Protocol):
    """What a vocabulary is read from; a `TextTokenizer` is one, and tokenizers of transformers."""

    @property
    def all_special_ids(self) -> Sequence[int]: ...

    def get_vocab(self) -> dict[str, int]: ...


class Vocabulary:
    """Column ↔ token id ↔ token text of one tokenizer and one kind.

    Attributes:
        tokens: Token texts in the order of their ids.
        kind: A key of `KINDS`.
        special_ids: Ids that mark structure ([CLS], [PAD] and the like), never part of a bag.
        column_to_id: `[columns]` int32, ascending token ids.
        id_to_column: `[size]` int32, −1 where the head computes no column.
        fingerprint: SHA-256 (hex) of the token texts in order; equal for equal tokenizers.
    """

    def __init__(
        self, tokens: Sequence[str], *, kind: str = "all", special_ids: Iterable[int] = ()
    ) -> None:
        """Builds the tables.

        Args:
            tokens: Token texts; the position is the id.
            kind: A key of `KINDS`.
            special_ids: Ids left out of bags of tokens.

        Raises:
            ConfigError: The kind is unknown, or keeps no token of this tokenizer.
            InputError: There is no token, or a special id is outside of the vocabulary.
        """
        if kind not in KINDS:
            raise ConfigError(f"`kind` must be one of {sorted(KINDS)}, got {kind!r}.")
        if not tokens:
            raise InputError("`tokens` must hold at least one token, got none.")
        self.tokens = tuple(tokens)
        self.kind = kind
        self.special_ids = frozenset(int(id) for id in special_ids)
        outside = sorted(id for id in self.special_ids if not 0 <= id < len(self.tokens))
        if outside:
            raise InputError(
                f"special ids must lie in [0, {len(self.tokens)}), got {outside[:3]}; "
                "tokens and special ids come from different tokenizers."
            )
        kept = KINDS[kind](self.tokens)
        if not kept:
            raise ConfigError(
                f"kind {kind!r} keeps none of the {len(self.tokens)} tokens; "
                "it is made for BERT's vocabulary: use kind 'all'."
            )
        self.column_to_id: IdArray = np.array(kept, np.int32)
        self.id_to_column: IdArray = np.full(len(self.tokens), -1, np.int32)
        self.id_to_column[self.column_to_id] = np.arange(len(kept), dtype=np.int32)
        for table in (self.column_to_id, self.id_to_column):
            table.flags.writeable = False
        self.fingerprint = _fingerprint(self.tokens)
        self._in_bag = self.id_to_column >= 0
        self._in_bag[list(self.special_ids)] = False
        self._ids: dict[str, int] | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer: _Tokens, kind: str = "all") -> Vocabulary:
        """The vocabulary of a Hugging Face tokenizer.

        Args:
            tokenizer: Anything with `get_vocab()` and `all_special_ids`.
            kind: A key of `KINDS`.

        Raises:
            InputError: Two tokens share an id. Ids that no token has are named `[id N]`.
            ConfigError: An id is larger than any vocabulary.
        """
        table = tokenizer.get_vocab()
        largest = max(table.values(), default=0)
        if largest >= BUDGET.vocabulary_ids:
            raise ConfigError(
                f"token ids must lie below {BUDGET.vocabulary_ids:,}, got {largest:,}; vectors are "
                "as wide as the largest id: the tokenizer is damaged."
            )
        found: list[str | None] = [None] * (largest + 1 if table else 0)
        if len(set(table.values())) != len(table):
            raise InputError(
                "every token must have an id of its own, got a tokenizer with shared ids; "
                "save it anew from its source."
            )
        for token, id in table.items():
            found[id] = token
        tokens = [f"[id {id}]" if token is None else token for id, token in enumerate(found)]
        return cls(tokens, kind=kind, special_ids=tokenizer.all_special_ids)

    @property
    def size(self) -> int:
        """Number of token ids, the width of every `SparseRows` over this vocabulary."""
        return len(self.tokens)

    @property
    def columns(self) -> int:
        """Number of columns the head computes."""
        return int(self.column_to_id.size)

    @property
    def first_id(self) -> int | None:
        """First token id when the columns are one unbroken range up to the end, else `None`.

        Such a head can take its projection as a slice of the word embeddings, without a copy.
        """
        first = int(self.column_to_id[0])
        return first if self.columns == self.size - first else None

    def __len__(self) -> int:
        """Same as `size`."""
        return self.size

    def __repr__(self) -> str:
        """Sizes, kind and the start of the fingerprint."""
        return (
            f"Vocabulary({self.size} ids, {self.columns} columns, kind={self.kind!r}, "
            f"fingerprint={self.fingerprint[:12]})"
        )

    def token(self, token_id: int) -> str:
        """Text of a token id.

        Raises:
            InputError: There is no such id.
        """
        if not 0 <= token_id < self.size:
            raise InputError(
                f"token ids must lie in [0, {self.size}), got {token_id}; "
                "the id comes from another vocabulary."
            )
        return self.tokens[token_id]

    def id(self, token: str) -> int:
        """Id of a token text.

        Raises:
            InputError: There is no such token; texts must be tokenized first.
        """
        if self._ids is None:
            self._ids = {text: i for i, text in enumerate(self.tokens)}
        if token not in self._ids:
            raise InputError(
                f"{token!r} is not a token of this vocabulary; tokenize the text first."
            )
        return self._ids[token]

    def columns_of(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Columns of token ids, `[D]` int64.

        Args:
            ids: `[D]` integers, such as the token ids of a row of an encoder.

        Raises:
            InputError: The model computes no weight of an id.
        """
        wanted = np.asarray(ids, np.int64).ravel()
        inside = (wanted >= 0) & (wanted < self.size)
        columns = self.id_to_column[np.where(inside, wanted, 0)].astype(np.int64)
        bad = wanted[~inside | (columns < 0)]
        if bad.size:
            raise InputError(
                f"the model computes no weight of the token ids {bad[:3].tolist()}; take ids of "
                "rows of this encoder."
            )
        return columns

    def bag_of_tokens(self, input_ids: npt.ArrayLike, cu_seqlens: npt.ArrayLike) -> SparseRows:
        """The set of tokens of each text with weight 1, the paper's bag-of-token entry BoW(x).

        Special tokens and ids without a column are left out.

        Args:
            input_ids: `[T]` integers, the token ids of all texts one after the other.
            cu_seqlens: `[B + 1]` integers, text b is `input_ids[cu_seqlens[b]:cu_seqlens[b + 1]]`.

        Raises:
            ShapeError: `cu_seqlens` does not start at 0, falls, or does not end at T.
            InputError: An id is outside of the vocabulary.
        """
        ids = np.asarray(input_ids).astype(np.int64, copy=False).ravel()
        bounds = np.asarray(cu_seqlens).astype(np.int64, copy=False).ravel()
        if (
            not bounds.size
            or bounds[0] != 0
            or bounds[-1] != ids.size
            or (np.diff(bounds) < 0).any()
        ):
            raise ShapeError(
                f"`cu_seqlens` must start at 0, never fall and end at T = {ids.size}, "
                f"got {np.array2string(bounds, threshold=6)}."
            )
        if ids.size and (ids.min() < 0 or ids.max() >= self.size):
            bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise InputError(
                f"token ids must lie in [0, {self.size}), got {bad}; "
                "tokenizer and vocabulary do not belong together."
            )
        row_of_token = np.repeat(np.arange(bounds.size - 1), np.diff(bounds))
        kept = self._in_bag[ids]
        keys = np.unique(row_of_token[kept] * self.size + ids[kept])
        counts = np.bincount(keys // self.size, minlength=bounds.size - 1)
        indptr = np.zeros(bounds.size, np.int64)
        np.cumsum(counts, out=indptr[1:])
        return SparseRows(indptr, keys % self.size, np.ones(keys.size, np.float32), self.size)

    def foreign_share(self, input_ids: npt.ArrayLike) -> float:
        """Share of pieces that no word of the tokenizer's languages falls into: 0 to 1.

        Counted are special tokens, that is unknown ones, and single letters with their mark taken
        off: what a text in another script or language is taken apart into. Digits and punctuation
        are left out on both sides.

        Args:
            input_ids: `[T]` integers, the own tokens of texts.
        """
        marks = (_CONTINUATION, _BYTE_LEVEL_SPACE, _SENTENCE_PIECE_SPACE)
        foreign = words = 0
        for id, count in zip(*np.unique(np.asarray(input_ids), return_counts=True), strict=True):
            text = self.token(int(id))
            for mark in marks:
                text = text.removeprefix(mark)
            is_unknown = int(id) in self.special_ids
            if is_unknown or text.isalpha():
                words += int(count)
                is_letter = len(text) == 1 and text not in ("a", "i")
                foreign += int(count) if is_unknown or is_letter else 0
        return foreign / words if words else 0.0

    def merge_word_pieces(
        self, text_ids: Sequence[int], weights: Mapping[int, float]
    ) -> list[tuple[str, float]]:
        """Words for people: pieces that stand together in a text become one word again.

        `giraffe` may be the three pieces `gi ##raf ##fe`. Where the text holds them in a row, they
        are shown as one word with the sum of their weights; weights of a piece that belongs to
        several words of the text go to the first. Dimensions that are not in the text (expansion)
        stand alone.

        Args:
            text_ids: Token ids of the text in order.
            weights: Token id → weight (or any additive share, such as a product q·p).

        Returns:
            (word, weight), heaviest first, equal weights in alphabetical order.
        """
        left = dict(weights)
        words: dict[str, float] = {}
        for group in self._words(text_ids):
            share = sum(left.pop(id) for id in dict.fromkeys(group) if id in left)
            if share:
                word = self._join(group)
                words[word] = words.get(word, 0.0) + share
        for id, weight in left.items():
            word = self._join([id])
            words[word] = words.get(word, 0.0) + weight
        return sorted(words.items(), key=lambda item: (-item[1], item[0]))

    def _words(self, text_ids: Sequence[int]) -> list[list[int]]:
        starts_marked = any(
            self.tokens[id].startswith((_BYTE_LEVEL_SPACE, _SENTENCE_PIECE_SPACE))
            for id in text_ids
        )
        groups: list[list[int]] = []
        open_group = False
        for id in text_ids:
            token = self.tokens[id]
            if id in self.special_ids:
                open_group = False
                continue
            if starts_marked:
                joins = not token.startswith((_BYTE_LEVEL_SPACE, _SENTENCE_PIECE_SPACE))
                joins = joins and token.isalnum()
            else:
                joins = token.startswith(_CONTINUATION)
            if joins and open_group:
                groups[-1].append(id)
            else:
                groups.append([id])
            open_group = True
        return groups

    def _join(self, group: Sequence[int]) -> str:
        texts = [self.tokens[id] for id in group]
        if len(texts) == 1 and texts[0].startswith(_CONTINUATION):
            return texts[0]  # a piece on its own keeps its mark: it is not a word
        text = "".join(text.removeprefix(_CONTINUATION) for text in texts)
        return text.replace(_BYTE_LEVEL_SPACE, "").replace(_SENTENCE_PIECE_SPACE, "") or texts[0]


def is_piece(word: str) -> bool:
    """Whether a token, or a word that `merge_word_pieces` gave, is only a piece of a word."""
    return word.startswith(_CONTINUATION) and word != _CONTINUATION


def _fingerprint(tokens: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for token in tokens:
        encoded = token.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return digest.hexdigest()
