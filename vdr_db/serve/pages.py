"""The pages as HTML: search, results, explanation, errors. No script; all text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vdr_db.budget import Budget
from vdr_db.explain.charts import bar_svg
from vdr_db.explain.explanation import Explanation, Match
from vdr_db.explain.hits import HitView
from vdr_db.explain.markup import clean, marked
from vdr_db.explain.numbers import decimals_for
from vdr_db.explain.report import explanation_html, match_html
from vdr_db.explain.report import style_sheet as report_style_sheet
from vdr_db.serve.facets import FacetCounts, values_of

if TYPE_CHECKING:
    from vdr_db.connectors import Id

__all__ = ["Asked", "explain_page", "page_html", "style_sheet"]

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Asked:
    """What a page was asked for, so that its links can ask for something near.

    Attributes:
        query: The text in the search box.
        page: Number of the page, from 1.
        facets: `KEY:VALUE` texts.
        budget: Of the application.
        has_upload: Whether images can be uploaded.
    """

    query: str
    page: int
    facets: tuple[str, ...]
    budget: Budget
    has_upload: bool

    def link(self, page: int | None = None) -> str:
        """Address of this page of results, or of another one of them."""
        return _results_address(self.query, self.facets, self.page if page is None else page)

    def toggled(self, facet: str) -> str:
        """Address of the first page with a facet chosen, or no longer chosen."""
        others = tuple(other for other in self.facets if other != facet)
        wanted = others if facet in self.facets else (*others, facet)
        return _results_address(self.query, wanted, 1)

    def why(self, id: Id | None = None) -> str:
        """Address of the explanation of the query, or of why a document matches it."""
        arguments = {"q": self.query}
        if id is not None:
            arguments |= {"id": str(id), "kind": "number" if isinstance(id, int) else "text"}
        return "/explain?" + urlencode(arguments)


def style_sheet() -> str:
    """The style sheet of all pages."""
    return report_style_sheet() + (TEMPLATES / "style.css").read_text(encoding="utf-8")


def explain_page(asked: Asked, shown: Match | Explanation) -> str:
    """Why a hit is a hit, or what a query says."""
    if isinstance(shown, Explanation):
        title, report = "What the query says", explanation_html(shown)
    else:
        title, report = f"Why {shown.id} matches", match_html(shown)
    return page_html("explain", title, asked, report=Markup(report))


def page_html(name: str, title: str, asked: Asked | None, **values: object) -> str:
    """The page of a template with the values it needs."""
    return _templates.get_template(f"{name}.html").render(title=title, asked=asked, **values)


def _results_address(query: str, facets: Sequence[str], page: int) -> str:
    pairs = [("q", query), *(("facet", facet) for facet in facets)]
    return "/?" + urlencode([*pairs, ("page", str(page))] if page > 1 else pairs)


def _about(hit: HitView, facets: Sequence[FacetCounts]) -> list[str]:
    """What stands under a title: the id, and the values of facets."""
    own = [str(hit.id)] if hit.title else []
    return own + [value for one in facets for value in values_of(one.facet, hit.payload)[:3]]


def _marked_snippet(hit: HitView) -> Markup:
    most = hit.words[0][1] if hit.words else None
    return Markup(marked(hit.snippet, hit.marks, most=most))


def _harmless(value: object) -> object:
    """What `{{ }}` writes before it is escaped: HTML of ours, numbers, or text that is clean."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_templates = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_harmless,
)
_templates.globals["about"] = _about
_templates.filters |= {
    "bar": lambda share: Markup(bar_svg(share)),
    "marked_snippet": _marked_snippet,
    "number": lambda value, largest: f"{value:.{decimals_for(largest, usual=2)}f}",
    "thousands": lambda value: f"{value:,}",
}
