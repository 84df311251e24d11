"""The pages as HTML: search, results, explanation, errors. No script; all text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from vdr_db.explain.charts import bar_svg
from vdr_db.explain.explanation import Explanation, Match
from vdr_db.explain.markup import escaped, marked
from vdr_db.explain.numbers import decimals_for
from vdr_db.explain.report import explanation_html, match_html
from vdr_db.explain.style import STYLE
from vdr_db.serve.facets import FacetCounts, values_of
from vdr_db.serve.guard import Limits
from vdr_db.serve.service import Found, HitView

__all__ = [
    "Asked",
    "error_page",
    "explain_page",
    "home_page",
    "image_page",
    "results_page",
    "style_sheet",
]

SHOWN_VALUES = 12
SHOWN_WORDS = 8

_STYLE = """
.top { background: var(--paper); border-bottom: 1px solid var(--line); }
.top > div { max-width: 1080px; margin: 0 auto; padding: 16px 24px; display: flex; flex-wrap: wrap;
  gap: 12px 24px; align-items: center; }
.brand { font-weight: 700; color: var(--ink); text-decoration: none; font-size: 18px; }
form.search { display: flex; flex: 1 1 420px; gap: 10px; }
input[type=search] { flex: 1; min-width: 0; font: inherit; padding: 10px 14px; color: var(--ink);
  border: 1px solid #c3ccd6; border-radius: 8px; background: var(--paper); }
button { font: inherit; font-weight: 600; padding: 10px 20px; border: 0; border-radius: 8px;
  background: var(--accent); color: #ffffff; cursor: pointer; }
input:focus-visible, button:focus-visible, a:focus-visible { outline: 3px solid #93b4fb;
  outline-offset: 1px; }
form.upload { display: flex; gap: 10px; align-items: center; font-size: 14px; min-width: 0; }
form.upload input { flex: 1 1 auto; min-width: 0; max-width: 230px; font: inherit;
  color: var(--soft); }
form.upload input::file-selector-button { font: inherit; padding: 6px 12px; margin-right: 10px;
  border: 1px solid #c3ccd6; border-radius: 8px; background: var(--paper); color: var(--ink); }
form.upload button { flex: none; padding: 7px 14px; background: #e8edf3; color: var(--ink); }
.results { display: grid; grid-template-columns: 210px minmax(0, 1fr); gap: 40px; }
.results.alone { grid-template-columns: minmax(0, 1fr); }
.count { color: var(--soft); font-size: 14px; margin: 4px 0 16px; }
.facet { margin-bottom: 26px; } .facet h2 { font-size: 14px; margin: 4px 0 8px; }
.facet ul { list-style: none; margin: 0; padding: 0; font-size: 14px; }
.facet a { display: flex; justify-content: space-between; gap: 12px; padding: 4px 8px;
  margin: 0 -8px; border-radius: 6px; color: var(--ink); text-decoration: none; }
.facet a:hover { background: #e8edf3; }
.facet a.chosen { background: #dbe6fe; font-weight: 600; }
.facet .n { color: var(--soft); font-variant-numeric: tabular-nums; }
.facet .value { overflow-wrap: anywhere; }
.facet .less { padding: 4px 0; color: var(--faint); font-size: 13px; }
.hit { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 24px 20px; margin: 0 0 16px; display: flex; gap: 20px; }
.hit > div { flex: 1; min-width: 0; }
.hit img { width: 112px; height: 112px; object-fit: contain;
  object-position: top; border-radius: 6px; flex: none; }
.hit header { display: flex; justify-content: space-between; gap: 20px; align-items: baseline; }
.hit h2 { font-size: 17px; margin: 0; overflow-wrap: anywhere; }
.hit h2 a { text-decoration: none; }
.hit h2 a:hover { text-decoration: underline; }
.hit .score { color: var(--soft); font-variant-numeric: tabular-nums; }
.hit .about { color: var(--soft); font-size: 14px; margin: 0 0 8px; overflow-wrap: anywhere; }
.hit .text { margin: 0 0 12px; font-size: 15px; }
.words { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 8px 10px; }
.words li { font-size: 13px; line-height: 1.4; background: #f1f4f7; border-radius: 6px;
  padding: 4px 10px 5px; max-width: 100%; }
.words .pair { display: flex; gap: 10px; justify-content: space-between; overflow-wrap: anywhere; }
.words .n { color: var(--soft); font-variant-numeric: tabular-nums; }
.words svg.bar { height: 3px; margin-top: 3px; min-width: 52px; }
.words li.more { background: transparent; color: var(--faint); padding-left: 0; }
.pages { display: flex; justify-content: space-between; gap: 20px; align-items: center;
  padding: 12px 0; font-size: 15px; }
.pages span { color: var(--soft); }
.empty { padding: 24px 0; }
@media (max-width: 720px) {
  .top > div { padding: 12px 14px; } form.search { flex-basis: 100%; }
  button { padding: 10px 14px; }
  .results { grid-template-columns: minmax(0, 1fr); gap: 8px; }
  .facet { margin-bottom: 14px; }
  .facet ul { display: flex; gap: 8px; overflow-x: auto; padding-bottom: 6px; }
  .facet a { margin: 0; padding: 5px 12px; background: var(--paper); border: 1px solid var(--line);
    white-space: nowrap; } .facet .less { white-space: nowrap; padding: 6px 0; }
  .hit { padding: 16px; } .hit img { width: 72px; height: 72px; }
}
"""


@dataclass(frozen=True)
class Asked:
    """What a page was asked for, so that its links can ask for something near.

    Attributes:
        query: The text in the search box.
        page: Number of the page, from 1.
        facets: `KEY:VALUE` texts.
        limits: Of the application.
        has_upload: Whether images can be uploaded.
    """

    query: str
    page: int
    facets: tuple[str, ...]
    limits: Limits
    has_upload: bool

    def link(self) -> str:
        """Address of this page of results, escaped for an attribute."""
        pairs = [("q", self.query), *(("facet", facet) for facet in self.facets)]
        if self.page > 1:
            pairs.append(("page", str(self.page)))
        return escaped("/?" + urlencode(pairs))


def style_sheet() -> str:
    """The style sheet of all pages."""
    return STYLE + _STYLE


def home_page(asked: Asked, info: Mapping[str, Any]) -> str:
    """The page before anything was asked."""
    body = (
        '<main><div class="empty"><h1>What are you looking for?</h1>'
        f'<p class="soft">{info["texts"]:,} documents, read by {escaped(info["model"])}. '
        "Write words or a whole sentence; the results show which words matched.</p></div></main>"
    )
    return _page("Search", asked, body)


def results_page(asked: Asked, found: Found, *, size: int) -> str:
    """A page of hits with facets beside them."""
    first = (asked.page - 1) * size
    if found.hits:
        known = f"more than {found.total:,}" if found.has_more else f"{found.total:,}"
        count = f"{first + 1:,}–{first + len(found.hits):,} of {known}, {found.took_ms:.0f} ms"
        listed = "".join(_hit(hit, asked, found.facets) for hit in found.hits)
    else:
        count = ""
        what = "on this page" if first else "that shares a word with this"
        chosen = " and has what was chosen" if asked.facets and not first else ""
        listed = f'<p class="empty soft">There is no document {what}{chosen}.</p>'
    explained = escaped("/explain?" + urlencode({"q": asked.query}))
    beside = _facets(asked, found.facets)
    said = f"{count} · " if count else ""
    body = (
        f'<main><div class="results{"" if beside else " alone"}">{beside}<div>'
        f'<p class="count">{said}<a href="{explained}">what the query says</a></p>'
        f"{listed}{_pages(asked, found, size)}</div></div></main>"
    )
    return _page(asked.query, asked, body)


def image_page(asked: Asked, found: Found) -> str:
    """The hits of an uploaded image, with what its vector says on top."""
    words = _words(found.words, with_bars=True)
    listed = "".join(_hit(hit, asked, ()) for hit in found.hits)
    listed = listed or '<p class="empty soft">There is no document that shares a word with it.</p>'
    body = (
        '<main><section class="card query-side"><h2>What the image says</h2>'
        f"{words}</section>{listed}</main>"
    )
    return _page("Image", asked, body)


def explain_page(asked: Asked, shown: Match | Explanation) -> str:
    """Why a hit is a hit, or what a query says."""
    if isinstance(shown, Explanation):
        heading, body = "What the query says", explanation_html(shown)
    else:
        heading, body = f"Why {shown.id} matches", match_html(shown)
    back = f'<p><a href="{asked.link()}">back to the results</a></p>'
    return _page(heading, asked, f"<main>{back}<h1>{escaped(heading)}</h1>{body}</main>")


def error_page(status: int, reason: str) -> str:
    """A page that says what went wrong."""
    body = (
        f'<main><div class="empty"><h1>{escaped(reason)}</h1><p class="soft">Error {status}. '
        '<a href="/">Search again</a></p></div></main>'
    )
    return _page(str(status), None, body)


def _page(title: str, asked: Asked | None, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,"><link rel="stylesheet" href="/style.css">'
        f"<title>{escaped(title)} · vdr-db</title></head><body>{_top(asked)}{body}</body></html>\n"
    )


def _top(asked: Asked | None) -> str:
    query = escaped(asked.query) if asked else ""
    most = f' maxlength="{asked.limits.query_characters}"' if asked else ""
    upload = ""
    if asked and asked.has_upload:
        upload = (
            '<form class="upload" action="/image" method="post" enctype="multipart/form-data">'
            '<input type="file" name="image" accept="image/*" aria-label="image" required>'
            "<button>Search by image</button></form>"
        )
    return (
        '<div class="top"><div><a class="brand" href="/">vdr-db</a>'
        '<form class="search" action="/" role="search">'
        f'<input type="search" name="q" value="{query}"{most} aria-label="query" '
        'placeholder="words or a sentence"><button>Search</button></form>'
        f"{upload}</div></div>"
    )


def _hit(hit: HitView, asked: Asked, facets: Sequence[FacetCounts]) -> str:
    kind = "number" if isinstance(hit.id, int) else "text"
    name = escaped(hit.title or hit.id)
    if asked.query:
        arguments = {"q": asked.query, "id": str(hit.id), "kind": kind}
        name = f'<a href="{escaped("/explain?" + urlencode(arguments))}">{name}</a>'
    about = [str(hit.id)] if hit.title else []
    for counts in facets:
        about += values_of(counts.facet, hit.payload)[:3]
    shown = marked(hit.snippet, hit.marks, most=hit.words[0][1] if hit.words else None)
    text = f'<p class="text">{shown}</p>' if hit.snippet else ""
    score = f"{hit.score:.{decimals_for(hit.score, usual=2)}f}"
    image = f'<img src="{escaped(hit.thumbnail)}" alt="{escaped(hit.title or hit.id)}">'
    return (
        f'<article class="hit">{image if hit.thumbnail else ""}<div>'
        f'<header><h2>{name}</h2><span class="score" title="score">{score}</span></header>'
        f'<p class="about">{escaped(" · ".join(about))}</p>'
        f"{text}{_words(hit.words)}</div></article>"
    )


def _words(words: Sequence[tuple[str, float]], *, with_bars: bool = True) -> str:
    if not words:
        return ""
    most = words[0][1]
    decimals = decimals_for(most, usual=2)
    items = []
    for word, share in words[:SHOWN_WORDS]:
        bar = bar_svg(share / most if most else 0.0) if with_bars else ""
        items.append(
            f'<li><span class="pair"><span>{escaped(word)}</span>'
            f'<span class="n">{share:.{decimals}f}</span></span>{bar}</li>'
        )
    if len(words) > SHOWN_WORDS:
        items.append(f'<li class="more">{len(words) - SHOWN_WORDS} more</li>')
    return f'<ul class="words" aria-label="words that matched">{"".join(items)}</ul>'


def _facets(asked: Asked, facets: Sequence[FacetCounts]) -> str:
    parts = []
    for counts in facets:
        items = []
        chosen_first = sorted(counts.counts, key=lambda item: not item[2])
        for text, count, is_chosen in chosen_first[:SHOWN_VALUES]:
            choice = f"{counts.facet.key}:{text}"
            others = tuple(facet for facet in asked.facets if facet != choice)
            wanted = others if is_chosen else (*others, choice)
            link = replace(asked, page=1, facets=wanted).link()
            state = ' class="chosen" aria-current="true"' if is_chosen else ""
            items.append(
                f'<li><a href="{link}"{state}><span class="value">{escaped(text)}</span>'
                f'<span class="n">{count:,}</span></a></li>'
            )
        more = len(counts.counts) - SHOWN_VALUES
        if more > 0:
            items.append(f'<li class="less">{more} more</li>')
        parts.append(
            f'<div class="facet"><h2>{escaped(counts.facet.label)}</h2>'
            f"<ul>{''.join(items)}</ul></div>"
        )
    return f'<nav aria-label="facets">{"".join(parts)}</nav>' if parts else ""


def _pages(asked: Asked, found: Found, size: int) -> str:
    is_last = asked.page * size >= found.total and not found.has_more
    is_deepest = asked.page * size > asked.limits.depth
    if asked.page == 1 and is_last:
        return ""
    before = after = "<span></span>"
    if asked.page > 1:
        link = replace(asked, page=asked.page - 1).link()
        before = f'<a rel="prev" href="{link}">← previous</a>'
    if not (is_last or is_deepest):
        link = replace(asked, page=asked.page + 1).link()
        after = f'<a rel="next" href="{link}">next →</a>'
    return (
        f'<nav class="pages" aria-label="pages">{before}<span>page {asked.page}</span>{after}</nav>'
    )
