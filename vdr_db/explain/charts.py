"""Bars, the grid of words by positions, and the map of an image's patches, as SVG.

Colours come from classes (`vdr_db.explain.style`), shades from `fill-opacity`: nothing here needs
an inline style, so a page with these drawings can forbid them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from vdr_db.explain.attribution import Attribution
from vdr_db.explain.cloud import text_width
from vdr_db.explain.markup import escaped
from vdr_db.explain.numbers import decimals_for
from vdr_db.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from vdr_db.explain.explanation import ShownImage

__all__ = ["bar_svg", "grid_svg", "image_address", "patches_svg", "shares_svg"]

CELL_X, CELL_Y = 40, 26
ROW_LABEL = 110
COLUMN_LABEL = 84
GRID_WORDS = 14
PATCH_WIDTH = 560
SMALL_WIDTH = 176
SHARES_WIDTH = 360
SMALL_MAPS = 6
LEAST_SHADE = 0.04
SHARE_OPACITY = 0.66


def bar_svg(share: float, tone: str = "both") -> str:
    """A bar of `share` (0..1) of its cell; `tone` is `query`, `document` or `both`."""
    width = 100 * min(max(share, 0.0), 1.0)
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="fill-{tone}" width="{width:.1f}" height="10"/></svg>'
    )


def grid_svg(attribution: Attribution, vocabulary: Vocabulary, *, most: int = GRID_WORDS) -> str:
    """Words by positions of a text: the darker a cell, the more weight the position would give.

    The number stands at the position a weight comes from; rows are the `most` heaviest words.

    Returns:
        An `<svg>` element, or `""` without words.
    """
    ids, weights = attribution.ids[:most], attribution.weights[:, :most]
    if not ids.size:
        return ""
    largest = float(weights.max()) or 1.0
    decimals = decimals_for(largest, usual=2)
    width = ROW_LABEL + CELL_X * len(attribution.positions) + 24
    height = COLUMN_LABEL + CELL_Y * ids.size + 4
    parts = []
    for p, name in enumerate(attribution.positions):
        x = ROW_LABEL + CELL_X * (p + 0.5)
        y = COLUMN_LABEL - 10
        parts.append(
            f'<text class="axis" x="{x:.0f}" y="{y}" transform="rotate(-50 {x:.0f} {y})">'
            f"{escaped(_short(name, 14))}</text>"
        )
    for d, id in enumerate(ids.tolist()):
        y = COLUMN_LABEL + CELL_Y * d
        parts.append(
            f'<text class="axis" text-anchor="end" x="{ROW_LABEL - 10}" y="{y + 17}">'
            f"{escaped(_short(vocabulary.token(id), 15))}</text>"
        )
        best = int(np.argmax(weights[:, d]))
        for p in range(len(attribution.positions)):
            share = max(float(weights[p, d]), 0.0) / largest
            x = ROW_LABEL + CELL_X * p
            parts.append(
                f'<rect class="cell" x="{x + 1}" y="{y + 1}" width="{CELL_X - 2}" '
                f'height="{CELL_Y - 2}" rx="3" fill-opacity="{max(share, LEAST_SHADE):.2f}"/>'
            )
            if p == best:
                dark = " on-dark" if share > 0.55 else ""
                parts.append(
                    f'<text class="value{dark}" text-anchor="middle" x="{x + CELL_X // 2}" '
                    f'y="{y + 17}">{_narrow(float(weights[p, d]), decimals)}</text>'
                )
    return (
        f'<svg class="grid" role="img" aria-label="weight of each word at each token" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{"".join(parts)}</svg>'
    )


def patches_svg(
    attribution: Attribution, vocabulary: Vocabulary, image: ShownImage, *, small: int = SMALL_MAPS
) -> str:
    """An image with the strongest word of each patch, and maps of the `small` heaviest words.

    Returns:
        A `<div class="patches">` of `<svg>` elements, or `""` without a grid or words.
    """
    if attribution.grid is None or not attribution.ids.size:
        return ""
    source = image_address(image)
    height = PATCH_WIDTH * image.height / image.width
    rows, columns = attribution.grid
    wide, high = PATCH_WIDTH / columns, height / rows
    strongest = float(attribution.weights.max()) or 1.0
    decimals = decimals_for(strongest, usual=2)
    # Some activations are above 0 everywhere; what counts is where a word stands out.
    lowest = min(float(attribution.weights.min()), strongest)
    parts = []
    for p, (id, weight) in attribution.strongest().items():
        row, column = divmod(p, columns)
        word = vocabulary.token(id)
        # Bold letters take about an eighth more than `text_width` counts.
        size = min(13.0, 0.5 * high, (wide - 6) / max(1.13 * text_width(word, 1.0), 0.1))
        parts.append(
            _patch("patch", p, columns, wide, high, 0.08 + 0.3 * weight / strongest)
            + f'<text class="patch-word" text-anchor="middle" x="{(column + 0.5) * wide:.1f}" '
            f'y="{(row + 0.5) * high + size / 3:.1f}" font-size="{size:.1f}">{escaped(word)}'
            f"<title>{escaped(word)} {weight:.{decimals}f}</title></text>"
        )
    big = _over(source, PATCH_WIDTH, height, "".join(parts), "the strongest word of each patch")
    maps = []
    step_x, step_y = SMALL_WIDTH / columns, SMALL_WIDTH * image.height / image.width / rows
    shares = SHARE_OPACITY * (attribution.weights - lowest) / ((strongest - lowest) or 1.0)
    for d, id in enumerate(attribution.ids[:small].tolist()):
        cells = "".join(
            _patch("share", p, columns, step_x, step_y, share)
            for p, share in enumerate(shares[:, d].tolist())
        )
        name = escaped(vocabulary.token(id))
        drawn = _over(source, SMALL_WIDTH, step_y * rows, cells, f"patches of {name}")
        maps.append(f"<figure>{drawn}<figcaption>{name}</figcaption></figure>")
    return (
        f'<div class="patches"><div class="scroll">{big}</div>'
        f'<div class="small-maps">{"".join(maps)}</div></div>'
    )


def shares_svg(attribution: Attribution, image: ShownImage, shares: Mapping[int, float]) -> str:
    """An image where the patches are coloured that a score comes from, the more the stronger.

    Returns:
        An `<svg>` element, or `""` without a grid.
    """
    if attribution.grid is None:
        return ""
    rows, columns = attribution.grid
    height = SHARES_WIDTH * image.height / image.width
    wide, high = SHARES_WIDTH / columns, height / rows
    totals = attribution.totals_of(shares)
    most = float(totals.max(initial=0.0)) or 1.0
    decimals = decimals_for(most, usual=3)
    parts = "".join(
        _patch(
            "share", p, columns, wide, high, SHARE_OPACITY * total / most, f"{total:.{decimals}f}"
        )
        for p, total in enumerate(totals.tolist())
        if total > 0
    )
    label = "the patches the score comes from"
    return _over(image_address(image), SHARES_WIDTH, height, parts, label)


def image_address(image: ShownImage) -> str:
    """The image itself as a `data:` address."""
    return f"data:{image.media_type};base64,{base64.b64encode(image.data).decode('ascii')}"


def _patch(
    kind: str, p: int, columns: int, wide: float, high: float, opacity: float, title: str = ""
) -> str:
    """The patch at position `p` as a rectangle of a class."""
    row, column = divmod(p, columns)
    end = f"><title>{title}</title></rect>" if title else "/>"
    return (
        f'<rect class="{kind}" x="{column * wide:.1f}" y="{row * high:.1f}" width="{wide:.1f}" '
        f'height="{high:.1f}" fill-opacity="{opacity:.2f}"{end}'
    )


def _over(source: str, width: float, height: float, parts: str, label: str) -> str:
    return (
        f'<svg class="patch-map" role="img" aria-label="{label}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}">'
        f'<image href="{source}" width="{width:.0f}" height="{height:.0f}" '
        f'preserveAspectRatio="none"/>{parts}</svg>'
    )


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _narrow(value: float, decimals: int) -> str:
    """A number for a cell: a zero in front takes the room of a digit that tells more."""
    text = f"{value:.{decimals}f}"
    return text.removeprefix("0") if decimals > 2 else text
