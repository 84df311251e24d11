"""Seeing what a vector says: words with weights, where each comes from, and why a hit is a hit.

The reports are HTML and SVG without a script and need no package; `save_png` needs the extra
`images`. `docs/seeing.md` shows what is in them.
"""

import warnings

from vdr_db.explain.attribution import Attribution, text_attribution, weights_by_position
from vdr_db.explain.charts import grid_svg, patches_svg, shares_svg
from vdr_db.explain.cloud import cloud_svg
from vdr_db.explain.explanation import Explanation, Match, ShownImage
from vdr_db.explain.items import explain_image, explain_text
from vdr_db.explain.matches import make_match, match_of, match_of_image
from vdr_db.explain.png import save_png
from vdr_db.explain.records import explain_record, is_image, thumbnail_of
from vdr_db.explain.renamed import RENAMED
from vdr_db.explain.report import report_html, save_html
from vdr_db.explain.words import Reason, matched_words, reasons, shared_words, shares_of

__all__ = [
    "Attribution",
    "Explanation",
    "Match",
    "Reason",
    "ShownImage",
    "cloud_svg",
    "explain_image",
    "explain_record",
    "explain_text",
    "grid_svg",
    "is_image",
    "make_match",
    "match_of",
    "match_of_image",
    "matched_words",
    "patches_svg",
    "reasons",
    "report_html",
    "save_html",
    "save_png",
    "shared_words",
    "shares_of",
    "shares_svg",
    "text_attribution",
    "thumbnail_of",
    "weights_by_position",
]


def __getattr__(name: str) -> object:
    """An old name, with a warning that says the new one."""
    if name not in RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new, value = RENAMED[name]
    warnings.warn(
        f"`{name}` is called `{new}` now; use that name.", DeprecationWarning, stacklevel=2
    )
    return value
