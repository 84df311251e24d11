"""Refuses a release that is not ready: python scripts/check_release.py TAG.

The tag is `v` and the version of pyproject.toml, the changelog has a dated section of it and
nothing under Unreleased, and the project's addresses are real ones: until it is known where the
project is published, they end in `.example`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def problems(tag: str, project: str, changelog: str) -> list[str]:
    """What keeps a tag from being released, by the texts of pyproject.toml and CHANGELOG.md."""
    about = tomllib.loads(project)["project"]
    version = about["version"]
    found = []
    if tag != f"v{version}":
        found.append(f"the tag must be v{version}, the version of pyproject.toml, got {tag}")
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$"
    if not re.search(heading, changelog, re.MULTILINE):
        found.append(f"CHANGELOG.md must have a section `## [{version}] - YYYY-MM-DD`")
    unreleased = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    if unreleased and unreleased[1].strip():
        found.append("CHANGELOG.md has entries under Unreleased; move them to the new section")
    for name, url in about.get("urls", {}).items():
        if re.match(r"https?://[^/]*\.example(/|$)", url):
            found.append(f"the address {name!r} is {url}, which stands for one to come; set it")
    return found


def main() -> int:
    """1 and the reasons on stderr, unless the tag can be released."""
    texts = [(ROOT / name).read_text("utf-8") for name in ("pyproject.toml", "CHANGELOG.md")]
    found = problems(sys.argv[1], *texts)
    for problem in found:
        sys.stderr.write(f"{problem}\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
