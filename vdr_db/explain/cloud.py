"""A word cloud as SVG, laid out here: the same words always give the same drawing.

Words are set from the heaviest on, each at the first free place of a spiral around the middle. The
width of a word is fixed in the drawing (`textLength`), so that words cannot overlap whatever fonts
the reader has.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from vdr_db.explain.markup import clean, escaped
from vdr_db.explain.numbers import decimals_for
from vdr_db.text.vocabulary import is_piece

__all__ = ["cloud_svg", "cloud_words", "text_width"]

SMALLEST_PX, LARGEST_PX = 15.0, 44.0
GAP_X_PX, GAP_Y_PX = 7.0, 3.0
# Words are wider than high, so a cloud would be; a phone has no room for a wide one.
STRETCH = 1.2
ASCENT, DESCENT = 0.80, 0.24
SHADES = 3

# Widths in ems of a usual sans-serif; what a font does differently is a slight squeeze.
_NARROW = frozenset("iljtfrI.,:;'!|()[] -")
_WIDE = frozenset("mwMW@%")


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.bottom <= other.top or other.bottom <= self.top)


def text_width(text: str, size: float) -> float:
    """About how wide a text is in a sans-serif font of `size` px, in px."""
    return size * max(sum(_ems(letter) for letter in text), 0.3)


def cloud_words(words: Sequence[tuple[str, float]], most: int) -> list[tuple[str, float]]:
    """The first `most` whole words that have a weight; pieces of words (`##ing`) say nothing."""
    whole = [(clean(word), weight) for word, weight in words if weight > 0 and not is_piece(word)]
    return whole[:most]


def cloud_svg(words: Sequence[tuple[str, float]], *, most: int = 40, label: str = "") -> str:
    """A word cloud of the first `most` whole words, heaviest first; areas grow with weights.

    Returns:
        An `<svg>` element, labelled for readers who cannot see it, or `""` without words.
    """
    decimals = decimals_for(words[0][1] if words else 0.0, usual=3)
    shown = cloud_words(words, most)
    if not shown:
        return ""
    heaviest = max(weight for _, weight in shown)
    boxes: list[_Box] = []
    texts: list[str] = []
    for word, weight in shown:
        share = weight / heaviest
        size = SMALLEST_PX + (LARGEST_PX - SMALLEST_PX) * share**1.4
        width = text_width(word, size)
        box = _free_place(width, size, boxes)
        boxes.append(box)
        x = box.left + GAP_X_PX
        baseline = box.top + GAP_Y_PX + ASCENT * size
        shade = SHADES - min(int(share * SHADES), SHADES - 1)
        texts.append(
            f'<text class="w{shade}" x="{x:.1f}" y="{baseline:.1f}" font-size="{size:.1f}" '
            f'textLength="{width:.1f}" lengthAdjust="spacingAndGlyphs">{escaped(word)}'
            f"<title>{escaped(word)} {weight:.{decimals}f}</title></text>"
        )
    left, top = min(box.left for box in boxes), min(box.top for box in boxes)
    width = max(box.right for box in boxes) - left
    height = max(box.bottom for box in boxes) - top
    return (
        f'<svg class="cloud" role="img" aria-label="{escaped(label or "word cloud")}" '
        f'viewBox="{left:.1f} {top:.1f} {width:.1f} {height:.1f}" '
        f'width="{width:.0f}" height="{height:.0f}">{"".join(texts)}</svg>'
    )


def _free_place(width: float, size: float, taken: Sequence[_Box]) -> _Box:
    wide, high = width + 2 * GAP_X_PX, size * (ASCENT + DESCENT) + 2 * GAP_Y_PX
    angle = 0.0
    while True:
        radius = 2.2 * angle
        x = radius * math.cos(angle) * STRETCH - wide / 2
        y = radius * math.sin(angle) - high / 2
        box = _Box(x, y, x + wide, y + high)
        if not any(box.meets(other) for other in taken):
            return box
        # Steps of about 6 px along the spiral, and never a full turn.
        angle += min(0.6, 6.0 / (radius + 1e-9))


def _ems(letter: str) -> float:
    if unicodedata.combining(letter):
        return 0.0
    if unicodedata.east_asian_width(letter) in "WF":
        return 1.0
    if letter in _NARROW:
        return 0.33
    if letter in _WIDE:
        return 0.88
    return 0.70 if letter.isupper() else 0.56
