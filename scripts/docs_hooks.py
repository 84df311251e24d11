"""What the documentation site makes of the pages: the README is its first page, links fit.

Pages are written for a reader of the repository. Links to files that are no pages (sources,
results, folders) become their names, so that `mkdocs build --strict` finds every other broken link.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\[]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def on_startup(**_: Any) -> None:
    """Lays the package out as it is installed, under one name, for the reader of docstrings."""
    package = ROOT / "build" / "reference" / "vdr_db"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    parts = {path.name: path for path in (ROOT / "vdr_db").iterdir()}
    parts |= {name: ROOT / name for name in ("kernels", "connectors")}
    for name, path in parts.items():
        (package / name).symlink_to(path)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page as the site shows it."""
    source = DOCS / page.file.src_uri
    if page.file.src_uri == "index.md":
        source = ROOT / "README.md"
        markdown = source.read_text("utf-8")
    return fitted(markdown, source, DOCS / page.file.src_uri)


def fitted(markdown: str, source: Path, shown: Path) -> str:
    """Links of the file `source` as they must be in the page `shown`."""

    def link(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / found["target"]))
        if target == ROOT / "README.md":
            target = DOCS / "index.md"
        if target.is_relative_to(DOCS) and target.suffix == ".md":
            place = os.path.relpath(target, shown.parent)
            return f"[{found['text']}]({place}{found['anchor'] or ''})"
        return found["text"] if target.exists() else found[0]

    return _LINK.sub(link, markdown)
