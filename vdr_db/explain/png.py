"""Word cloud, weights and reasons as a PNG file; matplotlib and wordcloud draw it."""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vdr_db.errors import ConfigError, require
from vdr_db.explain.cloud import cloud_words
from vdr_db.explain.explanation import Explanation, Match
from vdr_db.explain.markup import clean
from vdr_db.explain.numbers import decimals_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["save_png"]

COLOURS = {"query": "#3f6ad8", "document": "#0f8a7e", "both": "#d97706", "share": "#d3006c"}
CLOUD_COLOURS = {"query": "Blues", "document": "GnBu"}
INK, SOFT = "#1f2a37", "#5b6776"
CLOUD_WORDS, BARS, LEAST_ROWS = 60, 14, 8
CLOUD_PX, CLOUD_SCALE = (600, 320), 2
WIDTH_IN, ROW_IN, MAP_IN, DPI = 12.0, 4.4, 6.2, 120
TITLE_LETTERS = 90


def save_png(
    path: str | os.PathLike[str], shown: Match | Sequence[Explanation], *, title: str = ""
) -> None:
    """Draws a match, or explanations one below the other, with a title above everything.

    Raises:
        ConfigError: There is nothing to draw.
        MissingExtraError: matplotlib or wordcloud is not installed.
        OSError: It cannot be written.
    """
    for module in ("matplotlib", "wordcloud"):
        require(module, "images")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    explanations = [shown.query, shown.document] if isinstance(shown, Match) else list(shown)
    if not explanations:
        raise ConfigError("a drawing needs at least one explanation; pass [explanation].")
    rows = len(explanations) + isinstance(shown, Match)
    # A figure of its own, not pyplot's: no state is shared, and no window can open.
    layout = ConstrainedLayoutEngine(h_pad=0.15, w_pad=0.15, hspace=0.05, wspace=0.05)
    heights = [ROW_IN] * (rows - len(explanations))
    # The words of patches need room.
    heights += [MAP_IN if explanation.image is not None else ROW_IN for explanation in explanations]
    figure = Figure(figsize=(WIDTH_IN, sum(heights)), dpi=DPI, layout=layout)
    parts = figure.subfigures(rows, 1, squeeze=False, height_ratios=heights)[:, 0]
    if title:
        figure.suptitle(_short(title), color=INK, fontsize=15, parse_math=False)
    first = 0
    if isinstance(shown, Match):
        seen = [explanation for explanation in explanations if explanation.is_image]
        axes = parts[0].subplots(1, 2 + len(seen))
        _draw_reasons(axes[0], shown)
        _draw_sides(axes[1], shown)
        for place, explanation in zip(axes[2:], seen, strict=True):
            _draw_counted(place, explanation, shown)
        first = 1
    for part, explanation in zip(parts[first:], explanations, strict=True):
        tone = "query" if explanation.heading == "query" else "document"
        axes = part.subplots(1, 2)
        _draw_cloud(axes[0], explanation, tone)
        _draw_patches_or_bars(axes[1], explanation, tone)
    with warnings.catch_warnings():
        # Letters a font lacks are drawn as boxes; a warning for each of them helps nobody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, format="png", facecolor="white")


def _draw_reasons(axes: Axes, match: Match) -> None:
    found = [(reason.word, reason.product) for reason in match.reasons[:BARS]]
    score = f"{match.score:.{decimals_for(match.score, usual=3)}f}"
    _draw_bars(axes, found, COLOURS["both"], f"score {score}, word by word")


def _draw_sides(axes: Axes, match: Match) -> None:
    """Weights in query and document of the words that matched."""
    terms = [term for reason in match.reasons for term in reason.terms][:BARS]
    axes.set_title("weights of these words", color=INK, loc="left", fontsize=12)
    if not terms:
        axes.axis("off")
        return
    places = np.arange(len(terms))[::-1]
    for name, shift in (("query", 0.2), ("document", -0.2)):
        weights = [getattr(term, f"{name}_weight") for term in terms]
        axes.barh(places + shift, weights, height=0.36, color=COLOURS[name], label=name)
    _name_rows(axes, [term.token for term in terms])
    axes.legend(
        frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, labelcolor=INK
    )


def _draw_bars(axes: Axes, words: Sequence[tuple[str, float]], colour: str, title: str) -> None:
    axes.set_title(title, color=INK, loc="left", fontsize=12, parse_math=False)
    if not words:
        axes.axis("off")
        axes.text(0.0, 0.9, "no word", color=SOFT, transform=axes.transAxes)
        return
    weights = [weight for _, weight in words]
    decimals = decimals_for(max(weights), usual=2)
    bars = axes.barh(np.arange(len(words))[::-1], weights, height=0.62, color=colour)
    axes.bar_label(bars, fmt=f"%.{decimals}f", padding=5, color=SOFT, fontsize=9)
    axes.margins(x=0.12)
    _name_rows(axes, [word for word, _ in words])


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    labels = [_short(name, 24) for name in names]
    axes.set_yticks(np.arange(len(names))[::-1], labels, parse_math=False, color=INK)
    # A few bars are no thicker than many.
    axes.set_ylim(len(names) - max(len(names), LEAST_ROWS) - 0.5, len(names) - 0.5)
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=SOFT, labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9d1da")


def _draw_cloud(axes: Axes, explanation: Explanation, tone: str) -> None:
    from matplotlib.font_manager import FontProperties, findfont
    from wordcloud import WordCloud

    axes.axis("off")
    name = explanation.heading
    heading = f"{name}: {clean(explanation.text)}" if explanation.text else name
    axes.set_title(_short(heading, 54), color=INK, loc="left", fontsize=12, parse_math=False)
    words = dict(cloud_words(explanation.words, CLOUD_WORDS))
    if not words:
        axes.text(0.0, 0.9, "no weight at all", color=SOFT, transform=axes.transAxes)
        return
    heaviest = max(words.values())
    cloud = WordCloud(
        width=CLOUD_PX[0],
        height=CLOUD_PX[1],
        scale=CLOUD_SCALE,
        background_color="white",
        color_func=lambda word, **_: _shade(CLOUD_COLOURS[tone], words[word] / heaviest),
        font_path=findfont(FontProperties()),
        prefer_horizontal=1.0,
        relative_scaling=0.6,
        max_font_size=CLOUD_PX[1] // 4,
        margin=9,
        random_state=0,
    ).generate_from_frequencies(words)
    axes.imshow(cloud.to_array(), interpolation="bilinear")


def _draw_patches_or_bars(axes: Axes, explanation: Explanation, tone: str) -> None:
    attribution = explanation.attribution
    if attribution is None or attribution.grid is None or explanation.image is None:
        title = f"{explanation.nonzeros:,} weights, the heaviest words"
        _draw_bars(axes, list(explanation.words[:BARS]), COLOURS[tone], title)
        return
    _, columns = _draw_image(axes, explanation)
    axes.set_title("the strongest word of each patch", color=INK, loc="left", fontsize=12)
    # About what a patch of a square image has, in points.
    wide = 72 * (MAP_IN - 1.0) / columns
    for position, (id, _) in attribution.strongest().items():
        row, column = divmod(position, columns)
        word = _short(explanation.vocabulary.token(id), max(int(wide / 4.0), 3))
        axes.text(
            column + 0.5,
            row + 0.5,
            word,
            ha="center",
            va="center",
            color="white",
            fontsize=min(9.0, wide / (0.64 * max(len(word), 4))),
            parse_math=False,
            bbox={"facecolor": "#0b3b36", "alpha": 0.65, "edgecolor": "none", "pad": 1.0},
        )


def _draw_counted(axes: Axes, explanation: Explanation, match: Match) -> None:
    """An image of a match, coloured where the score comes from."""
    rows, columns = _draw_image(axes, explanation)
    name = "query" if explanation.heading == "query" else str(match.id)
    axes.set_title(_short(name, 30), color=INK, loc="left", fontsize=12, parse_math=False)
    attribution = explanation.attribution
    if attribution is None or attribution.grid is None or explanation.image is None:
        return
    totals = attribution.totals_of(match.shares()).reshape(rows, columns)
    red, green, blue = (int(COLOURS["share"][at : at + 2], 16) / 255 for at in (1, 3, 5))
    layer = np.empty((rows, columns, 4))
    layer[..., :3] = red, green, blue
    layer[..., 3] = 0.66 * np.clip(totals, 0, None) / (totals.max() or 1.0)
    axes.imshow(layer, extent=(0, columns, rows, 0), aspect="auto", interpolation="nearest")


def _draw_image(axes: Axes, explanation: Explanation) -> tuple[int, int]:
    """The image of an explanation; returns rows and columns of its patches."""
    require("PIL", "images")
    from PIL import Image

    attribution, image = explanation.attribution, explanation.image
    grid = attribution.grid if attribution is not None else None
    rows, columns = grid or (1, 1)
    data = base64.b64decode(explanation.thumbnail.partition(",")[2])
    with Image.open(io.BytesIO(image.data if image is not None else data)) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    axes.imshow(pixels, extent=(0, columns, rows, 0), aspect="auto")
    axes.set_box_aspect(pixels.shape[0] / pixels.shape[1])
    axes.axis("off")
    return rows, columns


def _shade(name: str, share: float) -> tuple[int, int, int]:
    """A colour of the darker half of a colour map: light words cannot be read on white."""
    from matplotlib import colormaps

    red, green, blue, _ = colormaps[name](0.6 + 0.4 * share, bytes=True)
    return int(red), int(green), int(blue)


def _short(text: str, most: int = TITLE_LETTERS) -> str:
    text = clean(text)
    return text if len(text) <= most else text[: most - 1] + "…"
