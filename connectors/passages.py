"""Passages: a long text as several rows, each with its span in the text and the document's id."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from vdr_db.counts import counted
from vdr_db.errors import ConfigError, StoreMismatch
from vdr_db.sparse import SparseRows

__all__ = [
    "PASSAGE_PREFIX",
    "PassageCutter",
    "PassageRows",
    "Passages",
    "Span",
    "check_passages",
    "checked_passages",
    "encode_passages",
    "passage_id",
]

PASSAGE_PREFIX = "_vdr_passage:"
"""How the ids of passages begin, but for the first of a document, which has the document's id."""

Span: TypeAlias = tuple[int, int]
"""First character of a passage in its text, and the first after it."""


@dataclass(frozen=True)
class Passages:
    """How long texts are cut into passages.

    Attributes:
        tokens: Most tokens of a passage; fewer where the model reads fewer.
        overlap: Most tokens that neighbours share, in whole sentences; at most half of `tokens`.

    Raises:
        ConfigError: A number is impossible.
    """

    tokens: int = 128
    overlap: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", counted("tokens", self.tokens))
        object.__setattr__(self, "overlap", counted("overlap", self.overlap, least=0))
        if 2 * self.overlap > self.tokens:
            raise ConfigError(
                f"`overlap` must be at most half of `tokens`, got {self.overlap} of {self.tokens}."
            )

    def to_dict(self) -> dict[str, int]:
        """The numbers as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> Passages | None:
        """What `to_dict` wrote; `None` stays `None`."""
        return None if data is None else cls(int(data["tokens"]), int(data["overlap"]))


def checked_passages(passages: bool | Passages | None) -> Passages | None:
    """What a caller asks for: `True` stands for the usual numbers, `None` and `False` for nothing.

    Raises:
        TypeError: It is something else.
    """
    if passages is None or passages is False:
        return None
    if passages is True:
        return Passages()
    if not isinstance(passages, Passages):
        raise TypeError(f"`passages` must be True or Passages(...), got {passages!r}")
    return passages


def check_passages(where: str, stored: Passages | None, wanted: Passages | None) -> None:
    """Refuses other passages than a collection was made with; `None` takes what is there.

    Raises:
        StoreMismatch: It holds whole documents, or passages cut otherwise.
    """
    if wanted is None or wanted == stored:
        return
    held = "whole documents" if stored is None else f"passages of {stored.to_dict()}"
    raise StoreMismatch(
        f"{where} holds {held}, not passages of {wanted.to_dict()}; leave `passages` out, or build "
        "another collection."
    )


class PassageCutter(Protocol):
    """An encoder that knows where its tokens stand in a text; `vdr_db.SparseEncoder` is one."""

    def cut_passages(
        self, texts: Sequence[str], /, *, tokens: int, overlap: int
    ) -> list[list[Span]]:
        """Spans of the passages of each text, in order; each text has one at least."""


@dataclass(frozen=True)
class PassageRows:
    """Rows of documents in passages; like `SparseRows`, but each document has one row or several.

    Attributes:
        rows: Of all passages, those of a document one after the other.
        bounds: `[N + 1]` int64: document i has the rows from `bounds[i]` to `bounds[i + 1]`.
        spans: Of each passage, in the text of its document.
    """

    rows: SparseRows
    bounds: npt.NDArray[np.int64]
    spans: Sequence[Span]

    def __len__(self) -> int:
        """Number of documents."""
        return self.bounds.size - 1

    def __getitem__(self, key: slice | Sequence[int] | npt.NDArray[Any], /) -> PassageRows:
        """Some of the documents, by a slice, numbers or a mask."""
        chosen = np.arange(len(self))[key]
        counts = np.diff(self.bounds)[chosen]
        bounds = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        places = np.repeat(self.bounds[chosen] - bounds[:-1], counts) + np.arange(bounds[-1])
        return PassageRows(self.rows[places], bounds, [self.spans[i] for i in places.tolist()])

    @staticmethod
    def concat(parts: Sequence[PassageRows]) -> PassageRows:
        """The documents of all parts, of which there is one at least, in their order."""
        counts = np.concatenate([np.diff(part.bounds) for part in parts])
        bounds = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        rows = SparseRows.concat([part.rows for part in parts])
        return PassageRows(rows, bounds, [span for part in parts for span in part.spans])

    @classmethod
    def empty(cls, width: int) -> PassageRows:
        """No documents."""
        return cls(SparseRows.empty(0, width), np.zeros(1, np.int64), [])

    @property
    def width(self) -> int:
        """Number of token ids."""
        return self.rows.width

    @property
    def nnz(self) -> int:
        """Weights of all passages."""
        return self.rows.nnz

    @property
    def nbytes(self) -> int:
        """Memory of the rows."""
        return self.rows.nbytes

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Weights of each document, `[N]` int64."""
        return self.rows.indptr[self.bounds[1:]] - self.rows.indptr[self.bounds[:-1]]

    def row(self, i: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Token ids and weights of the first passage of document i."""
        return self.rows.row(int(self.bounds[i]))


def encode_passages(
    encode: Callable[[list[str]], SparseRows],
    encoder: object,
    texts: Sequence[str],
    passages: Passages,
) -> PassageRows:
    """Rows of the passages of each text.

    Args:
        encode: Makes one row for each passage.
        encoder: Where `encode` comes from; it must be a `PassageCutter`.
        texts: Documents.
        passages: How they are cut.

    Raises:
        ConfigError: The encoder cannot tell where its tokens stand.
    """
    cut = getattr(encoder, "cut_passages", None)
    if cut is None:
        raise ConfigError(
            "passages need an encoder that tells where its tokens stand in a text, got "
            f"{type(encoder).__name__} without `cut_passages`; use vdr_db.SparseEncoder."
        )
    cutter: PassageCutter = encoder  # type: ignore[assignment]
    spans = cutter.cut_passages(texts, tokens=passages.tokens, overlap=passages.overlap)
    parts = [text[a:b] for text, own in zip(texts, spans, strict=True) for a, b in own]
    bounds = np.concatenate(([0], np.cumsum([len(own) for own in spans]))).astype(np.int64)
    return PassageRows(encode(parts), bounds, [span for own in spans for span in own])


def passage_id(document: str, number: int) -> str:
    """The id of a passage that is not the first, of the document with this sortable name."""
    digest = hashlib.sha256(document.encode()).hexdigest()[:32]
    return f"{PASSAGE_PREFIX}{number}:{digest}"
