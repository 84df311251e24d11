"""Make image-text pairs out of emoji, clip art and stamps that packages hold.

    python scripts/make_pictogram_pairs.py --cache FOLDER --out FOLDER

Needs `npm`, and for clip art and stamps a Debian machine with `apt`; root is not needed and nothing
is installed. Drawings are turned into images by `resvg-py`. Packages:

| package                                          | images                | licence       |
|--------------------------------------------------|-----------------------|---------------|
| npm `@iconify-json/noto`                         | emoji                 | Apache-2.0    |
| npm `@iconify-json/twemoji`                      | emoji                 | CC BY 4.0     |
| npm `@iconify-json/fluent-emoji-flat`            | emoji                 | MIT           |
| npm `@iconify-json/openmoji`                     | emoji                 | CC BY-SA 4.0  |
| npm `emojibase-data`                             | their names, keywords | MIT           |
| Debian `openclipart-svg`                         | clip art with titles  | public domain |
| Debian `tuxpaint-stamps-default` (tests only)    | photographs, captions | GPL-2+, ...   |

Written to the output folder: `images/`, and files of pairs, one JSON object a line:

    {"image": "images/noto/1f600.png", "text": ["grinning face", "grinning face, cheerful, ..."],
     "vendor": "noto", "emoji": "1f600"}

| file                 | emoji     | vendors                       | use        |
|----------------------|-----------|-------------------------------|------------|
| `train.jsonl`        | four fifths | all but one, and clip art   | training   |
| `unseen_vendor.jsonl`| the same  | the one left out              | evaluation |
| `unseen_emoji.jsonl` | one fifth | one that was trained on       | evaluation |
| `unseen_both.jsonl`  | one fifth | the one left out              | evaluation |
| `validation.jsonl`   | some of four fifths | one that was trained on | watching a run |
| `tuxpaint.jsonl`     |           | stamps                        | zero-shot  |
| `SOURCES.json`       |           | versions, licences, counts, SHA-256 | |

Only emoji that all four vendors draw are taken. They are held out by the SHA-256 of their code
points. Clip art whose title is the name of a held-out emoji stays out of training. The same
packages give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VENDORS = {
    "noto": "noto",
    "twemoji": "twemoji",
    "fluent": "fluent-emoji-flat",
    "openmoji": "openmoji",
}
NAMES = "emojibase-data"
CLIP_ART, STAMPS = "openclipart-svg", "tuxpaint-stamps-default"
LICENCES = {
    "noto": "Apache-2.0",
    "twemoji": "CC-BY-4.0",
    "fluent": "MIT",
    "openmoji": "CC-BY-SA-4.0",
    NAMES: "MIT",
    CLIP_ART: "public domain",
    STAMPS: "GPL-2+ and others, see the package",
}
HELD_OUT_EMOJI = 319
VALIDATION = 250
SIDE_PX = 224
NOISY_FOLDERS = {"shapes", "computer"}
CLIP_ART_BYTES = 400_000
"""Larger drawings take seconds each."""
TITLE = "{http://purl.org/dc/elements/1.1/}title"
KEYWORD = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
PLAIN_TITLE = re.compile(r"[a-z][a-z ,'-]*[a-z]")

Pair = dict[str, Any]


def fetch_npm(cache: Path, package: str) -> tuple[Path, str]:
    """The folder of an unpacked npm package, and its version; fetched once."""
    place = cache / package.replace("@", "").replace("/", "-")
    if not (place / "package.json").is_file():
        place.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", package]
        done = subprocess.run(command, check=True, cwd=place, capture_output=True, text=True)
        with tarfile.open(place / done.stdout.strip().splitlines()[-1]) as archive:
            for member in archive:
                member.name = member.name.partition("/")[2]
                if member.isfile() and ".." not in Path(member.name).parts:
                    archive.extract(member, place)
    version = json.loads((place / "package.json").read_text("utf-8"))["version"]
    return place, version


def fetch_debian(cache: Path, package: str) -> tuple[Path, str]:
    """The folder of an unpacked Debian package, and its version; fetched once."""
    place = cache / package
    if not list(place.glob("*.deb")):
        place.mkdir(parents=True, exist_ok=True)
        command = ["apt-get", "download", "-q", package]
        subprocess.run(command, check=True, cwd=place, stdout=sys.stderr)
    deb = sorted(place.glob("*.deb"))[-1]
    if not (place / "files").is_dir():
        subprocess.run(["dpkg-deb", "-x", str(deb), str(place / "files")], check=True)
    return place / "files", deb.name.split("_")[1]


def code_points(text: str) -> str:
    """Code points as all vendors write them: lower case, without the variation selector."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def read_icons(folder: Path) -> dict[str, str]:
    """Code points -> SVG of every emoji of a vendor; aliases take one hop."""
    icons = json.loads((folder / "icons.json").read_text("utf-8"))
    characters = json.loads((folder / "chars.json").read_text("utf-8"))
    width, height = icons.get("width", 16), icons.get("height", 16)
    drawings = {}
    for points, name in characters.items():
        alias = icons.get("aliases", {}).get(name, {})
        icon = icons["icons"].get(alias.get("parent", name))
        if icon is None:
            continue
        size = icon.get("width", width), icon.get("height", height)
        body = icon["body"]
        if alias.get("hFlip"):
            body = f'<g transform="translate({size[0]} 0) scale(-1 1)">{body}</g>'
        drawings[code_points(points)] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" '
            f'xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{size[0]}" height="{size[1]}">{body}</svg>'
        )
    return drawings


def read_names(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Code points -> name and keywords, of emoji that have both."""
    named = {}
    for entry in json.loads((folder / "en" / "data.json").read_text("utf-8")):
        name = entry["label"].lower()
        tags = entry.get("tags", [])
        if tags:
            keywords = [tag for tag in tags if tag not in name.split()]
            named[code_points(entry["hexcode"])] = (name, keywords)
    return named


def texts(name: str, keywords: list[str]) -> list[str]:
    """The name alone, and with the keywords."""
    return [name, ", ".join([name, *keywords])] if keywords else [name]


def draw(svg: str, target: Path) -> bool:
    """Draws an SVG unless that was done before; says whether there is an image now."""
    import resvg_py

    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Without dots per inch, sizes in millimetres or points count as 0.
            data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE_PX, dpi=96))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            sys.stderr.write(f"{target.name} is left out: {error}\n")
            return False
        target.write_bytes(data)
    return True


def read_clip_art(folder: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """Drawings with a title of plain words: path, title, keywords."""
    root = folder / "usr/share/openclipart/svg"
    for path in sorted(root.rglob("*.svg")):
        if path.relative_to(root).parts[0] in NOISY_FOLDERS:
            continue
        if path.stat().st_size > CLIP_ART_BYTES:
            continue
        try:
            tree = ElementTree.parse(path)
        except ElementTree.ParseError:
            continue
        title = next((e.text or "" for e in tree.iter() if e.tag == TITLE), "")
        title = re.sub(r"[\s_]+", " ", re.sub(r"\d+", " ", title)).strip().lower()
        words = [(e.text or "").strip().lower() for e in tree.iter() if e.tag == KEYWORD]
        keywords = [word for word in dict.fromkeys(words) if PLAIN_TITLE.fullmatch(word)]
        if PLAIN_TITLE.fullmatch(title) and 2 < len(title) < 60:
            yield path, title, [word for word in keywords if word not in title.split()][:8]


def read_stamps(folder: Path) -> Iterator[tuple[Path, str]]:
    """Stamps with an English caption."""
    for path in sorted((folder / "usr/share/tuxpaint/stamps").rglob("*.png")):
        caption = path.with_suffix(".txt")
        if not caption.is_file() or path.stem.endswith("_mirror"):
            continue
        lines = caption.read_text("utf-8", "replace").splitlines()
        if lines and lines[0].strip():
            yield path, lines[0].strip()


def emoji_pairs(
    icons: dict[str, dict[str, str]], named: dict[str, tuple[str, list[str]]], out: Path
) -> dict[str, list[Pair]]:
    """Vendor -> pairs of all emoji that every vendor draws, in the order of the lottery."""
    shared = set(named).intersection(*(set(drawings) for drawings in icons.values()))
    drawn = sorted(shared, key=lambda points: hashlib.sha256(points.encode()).hexdigest())
    pairs: dict[str, list[Pair]] = {vendor: [] for vendor in icons}
    for points in drawn:
        for vendor, drawings in icons.items():
            image = Path("images") / vendor / f"{points}.png"
            if not draw(drawings[points], out / image):
                raise SystemExit(f"{vendor} draws {points} in a way that resvg cannot.")
            pair = {"image": image.as_posix(), "text": texts(*named[points])}
            pairs[vendor].append({**pair, "vendor": vendor, "emoji": points})
    return pairs


def clip_art_pairs(folder: Path, out: Path, forbidden: set[str]) -> list[Pair]:
    """Pairs of clip art whose titles are none of the forbidden ones."""
    pairs = []
    for number, (path, title, keywords) in enumerate(read_clip_art(folder)):
        image = Path("images") / "openclipart" / f"{number:05}.png"
        svg = path.read_text("utf-8", "replace")
        if title not in forbidden and draw(svg, out / image):
            text = texts(title, keywords)
            pairs.append({"image": image.as_posix(), "text": text, "vendor": "openclipart"})
    return pairs


def stamp_pairs(folder: Path, out: Path) -> list[Pair]:
    """Pairs of stamps, copied at a common size."""
    from PIL import Image

    pairs = []
    seen: set[str] = set()
    for number, (path, caption) in enumerate(read_stamps(folder)):
        if caption.lower() in seen:  # it would have several right answers
            continue
        seen.add(caption.lower())
        image = Path("images") / "tuxpaint" / f"{number:05}.png"
        if not (out / image).exists():
            (out / image).parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as stored:
                small = stored.convert("RGBA")
            small.thumbnail((2 * SIDE_PX, 2 * SIDE_PX))
            data = io.BytesIO()
            small.save(data, "png")
            (out / image).write_bytes(data.getvalue())
        pairs.append({"image": image.as_posix(), "text": [caption], "vendor": "tuxpaint"})
    return pairs


def write_pairs(pairs: list[Pair], file: Path) -> None:
    """One JSON object a line."""
    lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    file.write_text("".join(lines), "utf-8")


def main() -> None:
    """Fetch, draw, split, write; say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True, help="folder for fetched packages")
    parser.add_argument("--out", type=Path, required=True, help="folder for images and pairs")
    parser.add_argument(
        "--unseen", choices=sorted(VENDORS), default="fluent", help="vendor held out"
    )
    parser.add_argument("--no-debian", action="store_true", help="without clip art and stamps")
    arguments = parser.parse_args()
    cache, out = arguments.cache.resolve(), arguments.out.resolve()

    fetched = {name: fetch_npm(cache, f"@iconify-json/{npm}") for name, npm in VENDORS.items()}
    fetched[NAMES] = fetch_npm(cache, NAMES)
    icons = {vendor: read_icons(fetched[vendor][0]) for vendor in VENDORS}
    pairs = emoji_pairs(icons, read_names(fetched[NAMES][0]), out)

    unseen = pairs.pop(arguments.unseen)
    held = {str(pair["emoji"]) for pair in unseen[:HELD_OUT_EMOJI]}
    watched = {str(pair["emoji"]) for pair in unseen[HELD_OUT_EMOJI:][:VALIDATION]}
    last = list(pairs)[-1]
    seen = [p for group in pairs.values() for p in group if p["emoji"] not in held]
    files = {
        "validation.jsonl": [p for p in seen if p["vendor"] == last and p["emoji"] in watched],
        "unseen_vendor.jsonl": unseen[HELD_OUT_EMOJI:],
        "unseen_emoji.jsonl": next(iter(pairs.values()))[:HELD_OUT_EMOJI],
        "unseen_both.jsonl": unseen[:HELD_OUT_EMOJI],
    }
    train = [p for p in seen if p["vendor"] != last or p["emoji"] not in watched]
    if not arguments.no_debian:
        for name in (CLIP_ART, STAMPS):
            fetched[name] = fetch_debian(cache, name)
        forbidden = {str(pair["text"][0]) for pair in unseen[:HELD_OUT_EMOJI]}
        train += clip_art_pairs(fetched[CLIP_ART][0], out, forbidden)
        files["tuxpaint.jsonl"] = stamp_pairs(fetched[STAMPS][0], out)
    files = {"train.jsonl": train, **files}
    for name, rows in files.items():
        write_pairs(rows, out / name)
    summary = {
        "packages": {name: version for name, (_, version) in fetched.items()},
        "licences": {name: LICENCES[name] for name in fetched},
        "unseen_vendor": arguments.unseen,
        "pairs": {name: len(rows) for name, rows in files.items()},
        "sha256": {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in files},
    }
    text = json.dumps(summary, indent=2) + "\n"
    (out / "SOURCES.json").write_text(text, "utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
