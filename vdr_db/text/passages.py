"""Where a long text may be cut into passages: at sentences, else at words, counted in tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Span", "passage_spans"]

Span: TypeAlias = tuple[int, int]
"""First character of a passage, and the first after it."""

# Behind the end of a sentence, with the quotes and brackets that close it, and behind a line.
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+|[。！？]+[”’」』）]*\s*|\s*\n\s*")
# A sentence that ends this early does not end a passage when the next one is longer than the rest.
_SMALLEST_PART = 4


def passage_spans(
    text: str, offsets: Sequence[Span] | None, *, tokens: int, overlap: int
) -> list[Span]:
    """Spans that cover a text from its first character to its last, each of so many tokens at most.

    A passage ends with a sentence where it can, else with a word, else between two tokens; the next
    one begins up to `overlap` tokens before that, with a sentence or a word.

    Args:
        text: The text; one without tokens is one passage.
        offsets: (start, stop) of each token in it, in order; `None` where they are not known, so
            that each character counts as a token.
        tokens: Most tokens of a passage.
        overlap: Most tokens that two neighbours share, at most half of `tokens`.
    """
    if offsets is None:
        offsets = [(i, i + 1) for i, letter in enumerate(text) if not letter.isspace()]
    count = len(offsets)
    if count <= tokens:
        return [(0, len(text))]
    bounds = np.array(offsets, np.int64)
    starts, stops = bounds[:, 0], np.maximum.accumulate(bounds[:, 1])
    # Tokens that a passage may begin with: not within a character, as tokens of bytes do.
    clean = np.flatnonzero(starts[1:] >= stops[:-1]) + 1
    is_word = [text[starts[i] - 1].isspace() for i in clean.tolist()]
    words = clean[np.array(is_word, np.bool_)]
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    sentences = np.intersect1d(np.searchsorted(starts, ends), clean)
    spans: list[Span] = []
    begin = end = 0
    while count - begin > tokens:
        # Each passage ends behind the one before, though it begins within it.
        least, most = max(end + 1, begin + tokens // _SMALLEST_PART), begin + tokens
        found = [_last(places, least, most) for places in (sentences, words, clean)]
        end = next((place for place in found if place is not None), 0)
        if not end:
            later = clean[clean > most]
            if not later.size:
                break
            end = int(later[0])
        spans.append((_place(starts, begin), int(starts[end])))
        at_sentence = bool(np.isin(end, sentences))
        shared = _first(sentences if at_sentence else words, end - overlap, end - 1)
        begin = shared if shared is not None and shared > begin else end
    spans.append((_place(starts, begin), len(text)))
    return spans


def _place(starts: npt.NDArray[np.int64], token: int) -> int:
    return int(starts[token]) if token else 0


def _last(places: npt.NDArray[np.int64], least: int, most: int) -> int | None:
    """The last of ascending places in `[least, most]`."""
    at = int(np.searchsorted(places, most, side="right")) - 1
    return int(places[at]) if at >= 0 and places[at] >= least else None


def _first(places: npt.NDArray[np.int64], least: int, most: int) -> int | None:
    """The first of ascending places in `[least, most]`."""
    at = int(np.searchsorted(places, least))
    return int(places[at]) if at < places.size and places[at] <= most else None
