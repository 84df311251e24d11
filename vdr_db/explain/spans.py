"""Where the tokens of a text stand in it, so that the text itself can be marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vdr_db.encoders.text import SparseEncoder

__all__ = ["NOWHERE", "Mark", "Span", "marks", "token_spans", "word_groups"]

Span = tuple[int, int]

NOWHERE: Span = (-1, -1)
"""Place of a token that is not in the text, such as [CLS]."""


@dataclass(frozen=True)
class Mark:
    """A part of a text that counts.

    Attributes:
        start: First character.
        stop: First character after it.
        share: How much it counts, above 0.
    """

    start: int
    stop: int
    share: float


def token_spans(encoder: SparseEncoder, text: str) -> tuple[list[int], list[Span]]:
    """Own token ids of a text, uncut, and (start, stop) of each in it; no model runs."""
    encoding = encoder.tokenizer.backend.encode(text, add_special_tokens=False)
    spans: list[Span] = []
    for start, stop in encoding.offsets:
        # Byte-level tokenizers count the space before a word as a part of it.
        while start < stop and text[start].isspace():
            start += 1
        spans.append((int(start), int(stop)))
    return [int(id) for id in encoding.ids], spans


def word_groups(text: str, spans: Sequence[Span]) -> list[list[int]]:
    """Positions of tokens that are one word: letters and digits with nothing between them.

    Every position comes once, in order; one that is `NOWHERE` stands alone.
    """
    groups: list[list[int]] = []
    for position, (start, stop) in enumerate(spans):
        before = spans[position - 1] if position else NOWHERE
        joins = (
            before != NOWHERE
            and (start, stop) != NOWHERE
            and 0 < start <= before[1]
            and stop > start
            # Two tokens can be bytes of one character; then the second starts where the first does.
            and (start < before[1] or (text[start - 1].isalnum() and text[start].isalnum()))
        )
        if joins:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups


def marks(text: str, spans: Sequence[Span], shares: Sequence[float]) -> list[Mark]:
    """Parts of a text to be marked, in order and without overlaps.

    Each token counts its share, 0 for not at all; neighbouring pieces of a word that count become
    one mark with the sum.
    """
    found: list[Mark] = []
    for group in word_groups(text, spans):
        for position in group:
            (start, stop), share = spans[position], shares[position]
            if share <= 0 or stop <= start or start < 0:
                continue
            last = found[-1] if found else None
            if last is not None and start <= last.stop and position != group[0]:
                found[-1] = Mark(last.start, max(stop, last.stop), last.share + share)
            elif last is None or start >= last.stop:
                found.append(Mark(start, stop, share))
    return found
