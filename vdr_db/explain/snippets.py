"""The part of a text that shows why it is a hit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from vdr_db.explain.spans import Mark

__all__ = ["SNIPPET", "moved_marks", "snippet", "telling_marks"]

SNIPPET = 340
"""Characters of a hit's text that are shown."""

_LEAST_SHARE = 0.05
"""Of the heaviest mark: below, a word tells nobody why a text was found."""


def telling_marks(text: str, found: Sequence[Mark]) -> list[Mark]:
    """Marks of words that matter: no punctuation, and nothing that adds next to nothing."""
    least = _LEAST_SHARE * max((mark.share for mark in found), default=0.0)
    return [
        mark
        for mark in found
        if mark.share >= least and any(map(str.isalnum, text[mark.start : mark.stop]))
    ]


def snippet(text: str, found: Sequence[Mark], *, length: int = SNIPPET) -> tuple[str, list[Mark]]:
    """The part of a text, about `length` long, with the largest shares, and the marks in it."""
    if len(text) <= length:
        return text, list(found)
    best, start = -1.0, 0
    for candidate in [0, *(max(mark.start - 60, 0) for mark in found)]:
        inside = [m for m in found if candidate <= m.start and m.stop <= candidate + length]
        worth = sum(mark.share for mark in inside)
        if worth > best + 1e-9:
            best, start = worth, candidate
    start = min(start, len(text) - length)
    stop = start + length
    if start:
        space = text.find(" ", start, start + 30)
        start = space + 1 if space >= 0 else start
    if stop < len(text):
        space = text.rfind(" ", stop - 30, stop)
        stop = space if space > start else stop
    before, after = "… " if start else "", " …" if stop < len(text) else ""
    inside = moved_marks(moved_marks(found, -start, within=stop - start), len(before))
    return before + text[start:stop] + after, inside


def moved_marks(found: Sequence[Mark], shift: int, *, within: int = sys.maxsize) -> list[Mark]:
    """Marks elsewhere in a text, those that then lie in its first `within` characters."""
    moved = (replace(mark, start=mark.start + shift, stop=mark.stop + shift) for mark in found)
    return [mark for mark in moved if mark.start >= 0 and mark.stop <= within]
