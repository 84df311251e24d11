"""Seeing what a vector says: words with weights, where each comes from, and why a hit is a hit.

```python
from vdr_db.explain import portrait_of_text, save_html

save_html("tea.html", [portrait_of_text(encoder, "hot water on green leaves")])
```

The reports are HTML and SVG without a script and need no package; `save_png` needs the extra
`images`. `docs/seeing.md` shows what is in them.
"""

from vdr_db.explain.attribution import Evidence, position_weights, text_evidence
from vdr_db.explain.charts import grid_svg, patches_svg, shares_svg
from vdr_db.explain.cloud import cloud_svg
from vdr_db.explain.explanation import (
    Match,
    Picture,
    Portrait,
    portrait_of_image,
)
from vdr_db.explain.items import image_portrait, portrait_of_text
from vdr_db.explain.matches import make_match, match_of, match_of_image
from vdr_db.explain.png import save_png
from vdr_db.explain.records import is_image, portrait_of_record, thumbnail_of
from vdr_db.explain.report import report_html, save_html
from vdr_db.explain.words import Reason, matched_words, reasons, shared_words, shares_of

__all__ = [
    "Evidence",
    "Match",
    "Picture",
    "Portrait",
    "Reason",
    "cloud_svg",
    "grid_svg",
    "image_portrait",
    "is_image",
    "make_match",
    "match_of",
    "match_of_image",
    "matched_words",
    "patches_svg",
    "portrait_of_image",
    "portrait_of_record",
    "portrait_of_text",
    "position_weights",
    "reasons",
    "report_html",
    "save_html",
    "save_png",
    "shared_words",
    "shares_of",
    "shares_svg",
    "text_evidence",
    "thumbnail_of",
]
