"""What people see in a terminal: tables of hits, terms and measurements, and one line of status.

Tables go to stdout; status lines and progress bars to stderr. Nothing here computes a score.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdr_db.errors import require

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from tqdm import tqdm

    from vdr_db.evaluation.quality import Quality, TestCollection
    from vdr_db.explain.hits import HitView

__all__ = [
    "console",
    "progress",
    "say",
    "say_truncated",
    "show_comparison",
    "show_explanation",
    "show_hits",
    "show_json",
    "show_log",
    "show_patches",
    "show_quality",
    "show_text",
    "show_vectors",
]

SHOWN_WORDS = 3
"""Matched words under a hit; the rest is counted."""

LEAST_PATCH = 5
"""Letters a word of a patch must have room for."""

NARROWEST = 76
"""Columns a terminal must have for images beside the hits."""

NARROWEST_BARS = 64
"""Columns a terminal must have for bars beside the hits; else their words stand below."""

_NBSP = "\u00a0"
_EIGHTHS = " ▏▎▍▌▋▊▉█"
# Control characters would let a stored text move the cursor or recolour the terminal.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


def say(line: str) -> None:
    """One line for people, on stderr."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def say_truncated(count: int) -> None:
    """Says once, at the end of a command, how many texts were longer than the model reads."""
    if count:
        say(f"{count:,} texts were longer than the model reads and were cut (--max-length)")


def show_text(text: str) -> None:
    """Plain text on stdout."""
    sys.stdout.write(f"{text}\n")


def show_json(value: Any) -> None:
    """One JSON value on one line of stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def show_log(name: str) -> None:
    """Sends what a logger says of its work to stderr, a line each."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        handler = logging.Handler()
        handler.emit = lambda record: say(record.getMessage())  # type: ignore[method-assign]
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


@contextmanager
def progress(total: int | None, unit: str, label: str) -> Iterator[tqdm[Any]]:
    """A progress bar on stderr if that is a terminal; has `update(count)`."""
    bar = require("tqdm", "cli").tqdm(
        total=total,
        unit=f" {unit}",
        desc=label,
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
        leave=False,
        dynamic_ncols=True,
    )
    with bar:
        yield bar


def show_hits(
    hits: Sequence[HitView],
    *,
    title: str = "",
    caption: str = "",
    images: Sequence[Text | None] = (),
) -> None:
    """Rank, score, document and matched words of each hit; bars share one scale.

    `images` holds half blocks of each hit, or None for a hit that is no image; it may be empty.
    """
    from rich.table import Table
    from rich.text import Text

    from vdr_db.explain.numbers import decimals_for

    out = console()
    if title:
        out.print(Text(_line(title), style="bold yellow"))
    if not hits:
        out.print(Text("nothing found", style="dim"))
    most = max((share for hit in hits for _, share in hit.words[:SHOWN_WORDS]), default=0.0)
    decimals = decimals_for(max((hit.score for hit in hits), default=0.0), usual=2)
    table = _table(width=min(out.width, 120))
    wide = 0
    if any(images) and out.width >= NARROWEST:
        wide = max(len(line) for image in images if image for line in image.plain.splitlines())
        table.add_column("", width=wide, no_wrap=True)
    table.add_column("#", justify="right", style="dim", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("document", ratio=1, overflow="ellipsis")
    has_bars = out.width >= NARROWEST_BARS
    if has_bars:
        table.add_column("words that matched", min_width=30, no_wrap=True)
    for rank, hit in enumerate(hits, start=1):
        id = _line(hit.id)
        title = _line(hit.title)
        heading = Text(title or id, style="bold", no_wrap=True, overflow="ellipsis")
        if title:
            heading = Text(id, style="bold cyan").append("  ").append(title, style="bold")
            heading.no_wrap, heading.overflow = True, "ellipsis"
        if hit.passage is not None:
            heading.append(f"  {hit.passage.number + 1} of {hit.passage.count}", style="dim")
        document = Table.grid()
        document.add_row(heading)
        taken = (42 if has_bars else 12) + (wide + 2 if wide else 0)
        document.add_row(_marked_lines(hit, min(out.width, 120) - taken, SHOWN_WORDS - 1))
        cells: list[str | Text | Table] = [images[rank - 1] or ""] if wide else []
        cells += [str(rank), f"{hit.score:.{decimals}f}", document]
        if has_bars:
            cells.append(_bars(hit.words, most))
        else:
            words = [f"{_line(word)} {share:.{decimals}f}" for word, share in hit.words]
            document.add_row(Text(", ".join(words[:SHOWN_WORDS]), style="green"))
        table.add_row()
        table.add_row(*cells)
    if hits:
        out.print(table)
    if caption:
        out.print(Text(caption, style="dim"))


def show_patches(words: Sequence[Sequence[str]]) -> None:
    """The strongest word of each patch of an image, as the patches lie."""
    from rich.table import Table
    from rich.text import Text

    out = console()
    columns = max((len(row) for row in words), default=0)
    width = min(14, out.width // columns - 1) if columns else 0
    if width < LEAST_PATCH:
        return
    table = Table.grid(padding=(0, 1, 0, 0))
    for _ in range(columns):
        table.add_column(width=width, no_wrap=True, overflow="ellipsis")
    for row in words:
        table.add_row(*(Text(_line(word) or "·", style="" if word else "dim") for word in row))
    out.print(Text("the strongest word of each patch", style="dim"))
    out.print(table)


def show_explanation(
    terms: Iterable[tuple[str, float, float]],
    score: float,
    *,
    limit: int = 0,
    own: float | None = None,
) -> None:
    """Token, its weight in query and document, and their product; the products sum to the score.

    At most `limit` tokens are shown, those with the largest products, and the others summed in one
    line; 0 shows all. Where it is given, the share of own words is told apart from the model's.
    """
    from vdr_db.explain.numbers import decimals_for

    products = [(token, query, document, query * document) for token, query, document in terms]
    products.sort(key=lambda row: -row[3])
    most = max((row[3] for row in products), default=0.0)
    weight_decimals = decimals_for(max((max(row[1:3]) for row in products), default=0.0), usual=3)
    decimals = decimals_for(most, usual=3)
    table = _table()
    table.add_column("token", no_wrap=True)
    for name in ("query", "document", "product"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    shown = products[:limit] if limit > 0 else products
    for token, query, document, product in shown:
        bar = _bar(product / most if most else 0.0, 20)
        weights = [f"{weight:.{weight_decimals}f}" for weight in (query, document)]
        table.add_row(_line(token), *weights, f"{product:.{decimals}f}", bar)
    rest = products[len(shown) :]
    if rest:
        left = sum(row[3] for row in rest)
        table.add_row(f"+ {len(rest)} more", "", "", f"{left:.{decimals}f}", "", style="dim")
    table.add_row("score", "", "", f"{score:.{decimals}f}", "", style="bold")
    for name, share in () if own is None else (("own words", own), ("model", score - own)):
        table.add_row(f"  {name}", "", "", f"{share:.{decimals}f}", "", style="dim")
    console().print(table)


def show_vectors(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], limit: int) -> None:
    """Each text with its heaviest words on the lines below it."""
    from rich.text import Text

    from vdr_db.explain.numbers import decimals_for

    out = console()
    for text, words in rows:
        shown = _line(text)
        out.print(Text(shown or "(empty text)", style="bold"), no_wrap=True, overflow="ellipsis")
        decimals = decimals_for(words[0][1] if words else 0.0, usual=2)
        cells = [f"{_line(word)}{_NBSP}{weight:.{decimals}f}" for word, weight in words[:limit]]
        if len(words) > limit:
            cells.append(f"and{_NBSP}{len(words) - limit}{_NBSP}more")
        # textwrap parts at spaces alone, so a word keeps its weight.
        for line in textwrap.wrap("   ".join(cells) or "no weight at all", out.width):
            out.print(Text(line, style="cyan" if words else "dim"))


def show_comparison(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], title: str) -> None:
    """A table of measurements; the first column is text, None and NaN show as a dash."""
    table = _table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console().print(table)


def show_quality(collection: TestCollection, measured: Sequence[Quality]) -> None:
    """The measurements as a table on stdout."""
    by_mode = any(quality.mode not in (None, "full") for quality in measured)
    first = "mode" if by_mode else "ranked by"
    rows = [
        {
            first: (by_mode and quality.mode) or Path(quality.ranker).name,
            "nDCG@10": f"{quality.ndcg_10:.3f}",
            "R@100": f"{quality.recall_100:.3f}",
            "MRR@10": f"{quality.mrr_10:.3f}",
            "weights/doc": _one_digit(quality.document_nonzeros),
            "/query": _one_digit(quality.query_nonzeros),
            "encode": f"{quality.encode_documents_s + quality.encode_queries_s:.1f} s",
            "index": f"{quality.index_s:.1f} s",
            "search": f"{quality.search_ms:.1f} ms",
        }
        for quality in measured
    ]
    title = (
        f"{collection.name}: {len(collection.documents):,} documents, "
        f"{len(collection.queries):,} judged queries"
    )
    if by_mode:
        title += f", {Path(measured[0].ranker).name}"
    show_comparison(list(rows[0]), rows, title)


def console() -> Console:
    """Standard output as rich writes to it."""
    require("rich", "cli")
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise  # rich would leave with 1, which says that nothing was found

    # Not a terminal: a width of its own, or rich would cut everything to 80 columns.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    return Output(file=sys.stdout, highlight=False, markup=False, emoji=False, width=width)


def _table(**options: Any) -> Table:
    from rich.table import Table

    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", **options)


def _line(value: object) -> str:
    return _CONTROL.sub(" ", str(value)).strip()


def _one_digit(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:,}" if isinstance(value, int) else _line(value)


def _marked_lines(hit: HitView, width: int, count: int) -> Text:
    """The part of a text that matches best, with what matched in bold."""
    from rich.text import Text

    from vdr_db.explain.snippets import snippet

    # What cannot be shown keeps its place, so that marks stay where they are.
    plain = _CONTROL.sub(lambda found: " " * len(found[0]), hit.snippet)
    shown, found = snippet(plain, hit.marks, length=max(width, 20) * count - 8)
    text = Text(shown, style="dim")
    for mark in found:
        text.stylize("bold not dim", mark.start, mark.stop)
    lines = text.wrap(console(), max(width, 20))
    return Text("\n").join(lines[:count])


def _bars(words: Sequence[tuple[str, float]], most: float) -> Table:
    from rich.table import Table

    from vdr_db.explain.numbers import decimals_for

    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True, width=12, overflow="ellipsis")
    grid.add_column(no_wrap=True, width=8)
    grid.add_column(justify="right", no_wrap=True)
    decimals = decimals_for(most, usual=2)
    for word, share in words[:SHOWN_WORDS]:
        grid.add_row(_line(word), _bar(share / most if most else 0.0, 8), f"{share:.{decimals}f}")
    if len(words) > SHOWN_WORDS:
        rest = math.fsum(share for _, share in words[SHOWN_WORDS:])
        grid.add_row(f"+ {len(words) - SHOWN_WORDS} more", "", f"{rest:.{decimals}f}", style="dim")
    return grid


def _bar(share: float, width: int) -> Text:
    """A bar of `share` (0..1) of `width` cells, in eighths of a cell."""
    from rich.text import Text

    eighths = max(1, round(min(max(share, 0.0), 1.0) * width * 8)) if share > 0 else 0
    full, rest = divmod(eighths, 8)
    return Text("█" * full + (_EIGHTHS[rest] if rest else ""), style="green")
