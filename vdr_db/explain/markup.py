"""Text made safe for HTML and SVG: escaped, without characters that move other text around."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from vdr_db.explain.spans import Mark

__all__ = ["STRENGTHS", "clean", "escaped", "marked"]

STRENGTHS = 4
"""Shades of a mark, from `m1` to `m4`."""

# Control characters are errors in HTML; overrides of the writing direction would turn the page.
_UNSAFE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def clean(text: object) -> str:
    """The text with a space for each unsafe character: places of characters stay as they are."""
    return _UNSAFE.sub(" ", str(text))


def escaped(text: object) -> str:
    """Any value as text of HTML or SVG, or as a quoted attribute."""
    return html.escape(clean(text), quote=True)


def marked(text: str, marks: Sequence[Mark], *, most: float | None = None) -> str:
    """A text as HTML, with `<mark>` around what counts; a share of `most` is shaded strongest."""
    if most is None:
        most = max((mark.share for mark in marks), default=0.0)
    parts: list[str] = []
    at = 0
    for mark in marks:
        strength = 1 + int(min(mark.share / most, 1.0) * (STRENGTHS - 1) + 0.5) if most else 1
        parts.append(escaped(text[at : mark.start]))
        parts.append(f'<mark class="m{strength}">{escaped(text[mark.start : mark.stop])}</mark>')
        at = mark.stop
    parts.append(escaped(text[at:]))
    return "".join(parts)
