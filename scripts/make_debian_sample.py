"""Make the demo's data: Debian package descriptions, topics and human judgements, in BEIR layout.

    python scripts/make_debian_sample.py --cache FOLDER

Needs a Debian machine with `apt`; root is not needed. Lists and the `debtags` package are fetched
into the cache folder, the machine's own lists stay as they are.

- Documents: programs of the stable suite. Title = the short description, text = the long one.
  Libraries, data, documentation and debug packages are left out (only `role::program` stays), one
  package per source package, no near twins (half of the word triples shared).
- Topics: debtags, which people have assigned to packages by hand. The query is the tag's title,
  completed by its facet where the title alone says little ("Board" is asked as "Board game",
  "Filters" as "Email filters"), and the first sentence of the tag's description if there is one.
- Judgement: 1 where the package carries the tag.

The same lists give the same bytes: packages are drawn in the order of the SHA-256 of their names.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Facets that say what a program is about, with the words that complete a title to a query. The
# others say how a program is built (interface, implemented-in, role, ...) or name an activity too
# wide to judge ("use": editing, viewing, checking, ...).
FACETS = {
    "accessibility": ("", ""),
    "admin": ("", ""),
    "biology": ("", "in biology"),
    "culture": ("", "language support"),
    "devel": ("", "for software development"),
    "field": ("", ""),
    "game": ("", "game"),
    "hardware": ("", "hardware"),
    "junior": ("", "for children"),
    "mail": ("Email", ""),
    "network": ("Network", ""),
    "office": ("Office", ""),
    "protocol": ("", "protocol"),
    "science": ("Scientific", ""),
    "security": ("Security", ""),
    "sound": ("Sound", ""),
    "web": ("Web", ""),
    "works-with": ("", ""),
    "works-with-format": ("", "format"),
}
# Tags too wide to judge anything, or about packaging.
DROPPED_TAGS = {
    "devel::debian",
    "devel::doc",
    "devel::examples",
    "devel::library",
    "devel::runtime",
    "works-with::text",
    "works-with::file",
    "works-with::people",
    "works-with::unicode",
    "hardware::opengl",
    "network::client",
    "network::server",
    "network::service",
}
# Sentences of the vocabulary that speak to the person who tags, not about the topic.
TAGGER_ADVICE = re.compile(
    r"\b(applies|debian|etc|facet|note|package|packages|please|see|tag|tagged|tags)\b",
    re.IGNORECASE,
)
MIN_TAGS = 2
MIN_WORDS, MAX_CHARACTERS = 20, 900
TWIN_SHARE = 0.5
FEWEST_PACKAGES, MOST_PACKAGES = 5, 300


@dataclass(frozen=True)
class Program:
    """One candidate document."""

    name: str
    source: str
    section: str
    title: str
    text: str
    tags: tuple[str, ...]

    @property
    def draw(self) -> str:
        """The place in the lottery: SHA-256 of the name."""
        return hashlib.sha256(self.name.encode()).hexdigest()


def read_stanzas(text: str) -> Iterator[dict[str, str]]:
    """Paragraphs of a Debian control file as field -> value; continuation lines lose one space."""
    fields: dict[str, str] = {}
    key = ""
    for line in text.split("\n"):
        if not line:
            if fields:
                yield fields
            fields = {}
        elif line[0] in " \t":
            fields[key] += "\n" + line[1:]
        else:
            key, _, value = line.partition(":")
            fields[key] = value.strip()
    if fields:
        yield fields


def fetch_lists(cache: Path) -> tuple[str, str, str]:
    """Package list, English descriptions and `InRelease` of the stable suite, through apt."""
    lists = cache / "lists"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    options = ["-o", f"Dir::State::lists={lists}", "-o", "Acquire::Languages=en"]
    subprocess.run(["apt-get", "update", "-q", *options], check=True, stdout=sys.stderr)

    def contents(ending: str) -> str:
        found = [
            path
            for path in sorted(lists.glob(f"*_debian_dists_*_{ending}*"))
            if "-updates_" not in path.name and "-backports_" not in path.name
        ]
        if not found:
            raise SystemExit(
                f"apt fetched no list that ends in {ending}; are its sources Debian's?"
            )
        helper = ["/usr/lib/apt/apt-helper", "cat-file", str(found[0])]
        return subprocess.run(helper, check=True, capture_output=True).stdout.decode("utf-8")

    return (
        contents("main_binary-amd64_Packages"),
        contents("main_i18n_Translation-en"),
        contents("InRelease"),
    )


def fetch_tag_vocabulary(cache: Path) -> tuple[str, str]:
    """Debtags' vocabulary file and the version of the package it came from."""
    if not list(cache.glob("debtags_*.deb")):
        subprocess.run(
            ["apt-get", "download", "-q", "debtags"], check=True, cwd=cache, stdout=sys.stderr
        )
    package = sorted(cache.glob("debtags_*.deb"))[-1]
    files = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", str(package)], check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(files)) as archive:
        member = archive.extractfile("./usr/share/debtags/vocabulary")
        if member is None:
            raise SystemExit(f"{package} holds no usr/share/debtags/vocabulary.")
        return member.read().decode("utf-8"), package.name.split("_")[1]


def flow(lines: list[str]) -> str:
    """A long description as plain paragraphs: list marks, blank markers and line breaks go."""
    paragraphs: list[str] = [""]
    for line in lines:
        stripped = line.strip()
        if stripped in {"", "."}:
            paragraphs.append("")
        elif line[:1] in " \t" or re.match(r"[-*+] ", stripped):
            paragraphs.append(re.sub(r"^[-*+o•] +", "", stripped))
        else:
            paragraphs[-1] = f"{paragraphs[-1]} {stripped}".strip()
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def read_programs(packages: str, descriptions: str) -> list[Program]:
    """Programs with at least `MIN_TAGS` topic tags and a text of the wanted length."""
    long_text = {
        stanza["Description-md5"]: stanza["Description-en"] for stanza in read_stanzas(descriptions)
    }
    programs = []
    for stanza in read_stanzas(packages):
        tags = {tag.strip() for tag in stanza.get("Tag", "").replace("\n", " ").split(",")}
        topics = sorted(
            tag
            for tag in tags - DROPPED_TAGS
            if tag.split("::")[0] in FACETS and not tag.endswith(("::TODO", "::not-applicable"))
        )
        described = long_text.get(stanza.get("Description-md5", ""))
        if "role::program" not in tags or len(topics) < MIN_TAGS or described is None:
            continue
        title, *lines = described.split("\n")
        text = flow(lines)
        if len(text.split()) < MIN_WORDS or len(text) > MAX_CHARACTERS:
            continue
        name = stanza["Package"]
        if re.match(r"lib|python3?-|ruby-|golang-", name) or re.search(
            r"-(dev|doc|dbg|data|common|dkms|plugin|plugins)$", name
        ):
            continue
        source = stanza.get("Source", name).split()[0]
        programs.append(Program(name, source, stanza["Section"], title, text, tuple(topics)))
    return programs


def drop_twins(programs: Iterable[Program]) -> list[Program]:
    """One program per source package, and of two near copies only the first, in order of draw."""
    best: dict[str, Program] = {}
    for program in programs:
        other = best.setdefault(program.source, program)

        def rank(candidate: Program) -> tuple[bool, int, int, str]:
            named = candidate.name == candidate.source
            return (not named, -len(candidate.tags), len(candidate.name), candidate.name)

        best[program.source] = min(program, other, key=rank)
    kept: list[Program] = []
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes: list[int] = []
    titles: set[str] = set()
    for program in sorted(best.values(), key=lambda program: program.draw):
        words = re.findall(r"\w+", program.text.lower())
        triples = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
        shared = Counter(holder for triple in triples for holder in holders[triple])
        if program.title.lower() in titles or any(
            count >= TWIN_SHARE * min(len(triples), sizes[holder])
            for holder, count in shared.items()
        ):
            continue
        for triple in triples:
            holders[triple].append(len(kept))
        sizes.append(len(triples))
        titles.add(program.title.lower())
        kept.append(program)
    return kept


def write_query(tag: str, description: str) -> str:
    """What somebody would ask to find the packages of `tag`."""
    title, *lines = description.split("\n")
    before, after = FACETS[tag.split("::")[0]]
    known = title.lower().replace("-", "")
    query = title
    if before.lower() not in known:
        query = f"{before} {title.lower() if title.istitle() else title}"
    if after.split(" ")[-1] not in known:
        query = f"{query} {after}"
    sentence = re.split(r"(?<=[a-z)])\.(?:\s|$)", flow(lines), maxsplit=1)[0].strip(" .\n")
    if sentence and len(sentence.split()) <= 30 and not TAGGER_ADVICE.search(sentence):
        query = f"{query}. {' '.join(sentence.split())}"
    return query


def make_archive(files: dict[str, str]) -> bytes:
    """A `.tar.gz` whose bytes depend on the files alone."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, text in sorted(files.items()):
            data = text.encode("utf-8")
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return gzip.compress(packed.getvalue(), compresslevel=9, mtime=0)


def main() -> None:
    """Fetch, choose, write; say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the fetched lists")
    parser.add_argument("--documents", type=int, default=1500, help="how many to draw")
    folder = Path(__file__).resolve().parent.parent / "vdr_db" / "data"
    parser.add_argument("--out", type=Path, default=folder / "debian_sample.tar.gz")
    arguments = parser.parse_args()

    packages, descriptions, release = fetch_lists(arguments.cache)
    vocabulary, debtags_version = fetch_tag_vocabulary(arguments.cache)
    meanings = {
        stanza["Tag"]: stanza["Description"]
        for stanza in read_stanzas(vocabulary)
        if "Tag" in stanza
    }
    drawn = drop_twins(read_programs(packages, descriptions))[: arguments.documents]
    drawn.sort(key=lambda program: program.name)
    holders: dict[str, list[str]] = defaultdict(list)
    for program in drawn:
        for tag in program.tags:
            holders[tag].append(program.name)
    topics = {
        tag: names
        for tag, names in sorted(holders.items())
        if FEWEST_PACKAGES <= len(names) <= MOST_PACKAGES and tag in meanings
    }
    queries = {tag: write_query(tag, meanings[tag]) for tag in topics}
    asked_twice = {query for query, count in Counter(queries.values()).items() if count > 1}
    topics = {tag: names for tag, names in topics.items() if queries[tag] not in asked_twice}

    def lines(rows: Iterable[dict[str, object]]) -> str:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    dated = re.search(r"^Date: (.*)$", release, re.MULTILINE)
    version = re.search(r"^Version: (.*)$", release, re.MULTILINE)
    judged = sum(len(names) for names in topics.values())
    source = (
        f"Debian {version.group(1) if version else '?'} main amd64, release file of "
        f"{dated.group(1) if dated else '?'}; debtags {debtags_version}.\n"
        f"{len(drawn)} documents, {len(topics)} topics, {judged} judgements.\n"
        "Terms: debian_sample.LICENSE.md beside this archive in the source tree.\n"
    )
    files = {
        "SOURCE": source,
        "COPYING.GPL-2": Path("/usr/share/common-licenses/GPL-2").read_text("utf-8"),
        "corpus.jsonl": lines(
            {
                "_id": program.name,
                "title": program.title,
                "text": program.text,
                "metadata": {"section": program.section},
            }
            for program in drawn
        ),
        "queries.jsonl": lines({"_id": tag, "text": queries[tag]} for tag in topics),
        "qrels/test.tsv": "query-id\tcorpus-id\tscore\n"
        + "".join(f"{tag}\t{name}\t1\n" for tag, names in topics.items() for name in names),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_bytes(make_archive(files))
    size = arguments.out.stat().st_size
    sys.stdout.write(f"{source}{arguments.out}: {size:,} bytes\n")


if __name__ == "__main__":
    main()
