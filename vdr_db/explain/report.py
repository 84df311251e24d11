"""One HTML page that shows a vector, or why two of them match: no script, no network, no file else.

The parts (`match_html`, `explanation_html`) are used by the web page too, their text is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from vdr_db.errors import ConfigError
from vdr_db.explain.charts import bar_svg, grid_svg, image_address, patches_svg, shares_svg
from vdr_db.explain.cloud import cloud_svg
from vdr_db.explain.explanation import Explanation, Fired, Match
from vdr_db.explain.markup import escaped, marked
from vdr_db.explain.numbers import decimals_for
from vdr_db.explain.words import Reason
from vdr_db.version import __version__

if TYPE_CHECKING:
    from vdr_db.connectors.base import Term

__all__ = ["explanation_html", "match_html", "report_html", "save_html", "style_sheet"]

SHOWN_WORDS = 12
SHOWN_REASONS = 25
SHOWN_FIRED = 4
WHOLE_LETTERS = 14
SHOWN_POSITIONS = 120
GRID_POSITIONS = 32
"""A grid with more columns is wider than anybody scrolls."""


def report_html(
    shown: Match | Sequence[Explanation],
    *,
    title: str = "",
    facts: Mapping[str, object] | None = None,
) -> str:
    """A whole page: a match, or explanations one below the other.

    Its title is by default made of what is shown; the facts, such as the model's name, are said at
    its end.

    Raises:
        ConfigError: There is nothing to show.
    """
    if isinstance(shown, Match):
        heading = title or f"Why {shown.id} matches"
        body = match_html(shown)
    else:
        if not shown:
            raise ConfigError("a report needs at least one explanation; pass [explanation].")
        heading = title or "What a vector says"
        body = "".join(explanation_html(explanation) for explanation in shown)
    said = " · ".join(f"{escaped(name)} {escaped(value)}" for name, value in (facts or {}).items())
    foot = f"<footer>{said}{' · ' if said else ''}vdr-db {escaped(__version__)}</footer>"
    # The style sheet is inside, and nothing from elsewhere is allowed.
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(heading)}</title><style>\n{style_sheet()}</style></head>"
        f"<body><main><h1>{escaped(heading)}</h1>{body}{foot}</main></body></html>\n"
    )


def save_html(
    path: str | os.PathLike[str],
    shown: Match | Sequence[Explanation],
    *,
    title: str = "",
    facts: Mapping[str, object] | None = None,
) -> None:
    """Writes `report_html` to a file.

    Raises:
        OSError: It cannot be written.
    """
    Path(path).write_text(report_html(shown, title=title, facts=facts), encoding="utf-8")


@cache
def style_sheet() -> str:
    """The style sheet of reports and of the web page."""
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def match_html(match: Match) -> str:
    """Why a document matches: its reasons, beside them what counted, and both explanations."""
    document = match.document
    table = _reasons_table(match)
    images = "".join(_counted(one, match) for one in (match.query, document) if one.is_image)
    if images:
        table = f'<div class="columns"><div>{table}</div><div>{images}</div></div>'
    text = ""
    if document.text:
        found = document.marks(match.shares())
        text = (
            "<h3>where it comes from in the text</h3>"
            f'<p class="text">{marked(document.text, found)}</p>'
        )
        if document.attribution is not None:
            text += f'<p class="note">{_elsewhere(match)}</p>'
    body = f'<section class="card reasons"><h2>The score, word by word</h2>{table}{text}</section>'
    return body + explanation_html(match.query) + explanation_html(document)


def _counted(explanation: Explanation, match: Match) -> str:
    """An image of a match, with the patches the score comes from where that is known."""
    name = escaped("the query" if explanation.heading == "query" else str(match.id))
    attribution, image = explanation.attribution, explanation.image
    if attribution is not None and attribution.grid is not None and image is not None:
        drawn = shares_svg(attribution, image, match.shares())
        if match.reasons:
            name += ": the stronger a patch is coloured, the more of the score comes from it"
        return f"<figure>{drawn}<figcaption>{name}</figcaption></figure>"
    return f"<figure>{_plain_image(explanation)}<figcaption>{name}</figcaption></figure>"


def _plain_image(explanation: Explanation) -> str:
    source = explanation.thumbnail
    if explanation.image is not None:
        source = image_address(explanation.image)
    return f'<img class="plain" src="{escaped(source)}" alt="{escaped(explanation.heading)}">'


def explanation_html(explanation: Explanation) -> str:
    """A card with word cloud, weights, and what fires where."""
    name = explanation.heading
    side = "query-side" if name == "query" else "document-side"
    tone = "query" if name == "query" else "document"
    parts = [f'<section class="card {side}"><h2>{escaped(name[:1].upper() + name[1:])}</h2>']
    if explanation.text:
        parts.append(f'<p class="text">{marked(explanation.text, explanation.marks())}</p>')
    has_map = explanation.attribution is not None and explanation.attribution.grid is not None
    if explanation.is_image and not (has_map and explanation.words):
        parts.append(_plain_image(explanation))
    if not explanation.words:
        parts.append('<p class="soft">No weight at all: no search finds this.</p></section>')
        return "".join(parts)
    cloud = cloud_svg(explanation.words, label=f"the heaviest words of the {name}")
    parts.append(
        f'<div class="columns"><div><h3>its {min(len(explanation.words), 40)} heaviest words</h3>'
        f"{cloud}</div><div><h3>weights</h3>{_weights_table(explanation, tone)}</div></div>"
    )
    parts.append(_positions(explanation))
    parts.append("</section>")
    return "".join(parts)


def _positions(explanation: Explanation) -> str:
    attribution = explanation.attribution
    if attribution is None:
        return ""
    if attribution.grid is not None and explanation.image is not None:
        drawn = patches_svg(attribution, explanation.vocabulary, explanation.image)
        return f"<h3>which word fires on which patch</h3>{drawn}"
    fired = explanation.fired()
    if not fired:
        return ""
    shown = fired[:SHOWN_POSITIONS]
    decimals = decimals_for(explanation.words[0][1], usual=2) if explanation.words else 2
    cards = "".join(_fired_card(item, decimals) for item in shown)
    more = len(fired) - len(shown)
    rest = f'<p class="note">and {more} more words of the text</p>' if more else ""
    made = (
        "<h3>which words fire on which word of the text</h3>"
        '<p class="note">Each weight comes from the one place where it is largest.</p>'
        f'<div class="fired">{cards}</div>{rest}'
    )
    if len(attribution.positions) <= GRID_POSITIONS:
        grid = grid_svg(attribution, explanation.vocabulary)
        made += f'<h3>the weight each token alone would give</h3><div class="scroll">{grid}</div>'
    return made


def _fired_card(fired: Fired, decimals: int) -> str:
    kind = " special" if fired.is_special else ""
    name = f'<span class="name{kind}">{escaped(fired.label)}</span>'
    if not fired.words:
        return f'<div class="none">{name}</div>'
    rows = "".join(
        f"<dt>{escaped(word)}</dt><dd>{weight:.{decimals}f}</dd>"
        for word, weight in fired.words[:SHOWN_FIRED]
    )
    more = len(fired.words) - SHOWN_FIRED
    if more > 0:
        rows += f"<dt>and {more} more</dt><dd></dd>"
    return f"<div>{name}<dl>{rows}</dl></div>"


def _weights_table(explanation: Explanation, tone: str) -> str:
    most = explanation.words[0][1]
    decimals = decimals_for(most, usual=3)
    rows = "".join(
        f'<tr>{_word_cell(word)}<td class="number">{weight:.{decimals}f}</td>'
        f'<td class="bars">{bar_svg(weight / most if most else 0.0, tone)}</td></tr>'
        for word, weight in explanation.words[:SHOWN_WORDS]
    )
    more = len(explanation.words) - SHOWN_WORDS
    rest = f'<p class="note">and {more:,} more</p>' if more > 0 else ""
    return f"<table><tbody>{rows}</tbody></table>{rest}"


def _reasons_table(match: Match) -> str:
    if not match.reasons:
        return '<p class="soft">The two share no word.</p>'
    digits = _Decimals.of(match)
    most = match.reasons[0].product
    rows = "".join(_reason_rows(reason, most, digits) for reason in match.reasons[:SHOWN_REASONS])
    rest = match.reasons[SHOWN_REASONS:]
    if rest:
        sum_of_rest = sum(reason.product for reason in rest)
        rows += (
            f'<tr><td class="word soft">{len(rest)} more</td><td></td><td></td>'
            f'{digits.product_cell(sum_of_rest)}<td class="bars"></td></tr>'
        )
    name = "image" if match.document.is_image else "document"
    head = (
        f'<tr><th>word</th><th class="number">query</th><th class="number">{name}</th>'
        '<th class="number">product</th><th class="bars"></th></tr>'
    )
    total = (
        '<tr class="total"><td>score</td><td></td><td></td>'
        f'{digits.product_cell(match.score)}<td class="bars"></td></tr>'
    )
    if match.query.own or match.document.own:
        parts = (("own words", match.own_score), ("model", match.score - match.own_score))
        total += "".join(
            f'<tr><td class="word soft">{name}</td><td></td><td></td>'
            f'{digits.product_cell(part)}<td class="bars"></td></tr>'
            for name, part in parts
        )
    return f"<table><thead>{head}</thead><tbody>{rows}{total}</tbody></table>"


@dataclass(frozen=True)
class _Decimals:
    """Decimals of the columns of a table of reasons: those of the weights, and of the products."""

    weights: int
    products: int

    @classmethod
    def of(cls, match: Match) -> _Decimals:
        terms = [term for reason in match.reasons for term in reason.terms]
        largest = max(max(term.query_weight, term.document_weight) for term in terms)
        # The largest product, not the score, says what is readable in the lines of words.
        product = match.reasons[0].product
        return cls(decimals_for(largest, usual=3), decimals_for(product, usual=3))

    def weight_cells(self, term: Term) -> str:
        return "".join(
            f'<td class="number">{weight:.{self.weights}f}</td>'
            for weight in (term.query_weight, term.document_weight)
        )

    def product_cell(self, product: float) -> str:
        return f'<td class="number">{product:.{self.products}f}</td>'


def _reason_rows(reason: Reason, most: float, digits: _Decimals) -> str:
    bar = f'<td class="bars">{bar_svg(reason.product / most if most else 0.0)}</td>'
    word, product = _word_cell(reason.word), digits.product_cell(reason.product)
    if len(reason.terms) == 1:
        cells = digits.weight_cells(reason.terms[0])
        return f"<tr>{word}{cells}{product}{bar}</tr>"
    # Sums of weights would not multiply to the sum of products, so pieces keep lines of their own.
    pieces = "".join(
        f'<tr class="piece">{_word_cell(term.token)}'
        f"{digits.weight_cells(term)}{digits.product_cell(term.product)}"
        '<td class="bars"></td></tr>'
        for term in reason.terms
    )
    return f"<tr>{word}<td></td><td></td>{product}{bar}</tr>{pieces}"


def _word_cell(word: str) -> str:
    """A word of a table; only long ones may be broken to keep a phone's page in its frame."""
    return f'<td class="word{" whole" if len(word) <= WHOLE_LETTERS else ""}">{escaped(word)}</td>'


def _elsewhere(match: Match) -> str:
    """How much of the score the marked text stands for."""
    if not match.score:
        return ""
    inside = sum(mark.share for mark in match.document.marks(match.shares())) / match.score
    told = "The darker a word, the more of the score comes from it"
    if inside > 0.995:
        return f"{told}."
    return f"{told}; {1 - inside:.0%} comes from the special tokens around the text."
