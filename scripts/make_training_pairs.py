"""Make the training pairs of the default model from Debian packages.

    python scripts/make_training_pairs.py --cache FOLDER --out FOLDER

Needs a Debian machine with `apt`; root is not needed. Package lists and the packages
`wordnet-base` and `dict-foldoc` are fetched into the cache folder; nothing is installed and the
machine's own lists stay as they are. Written to the output folder:

| file | query | document | licence of the texts |
|---|---|---|---|
| `debian.tsv` | short description | long description | DFSG-free, by package |
| `wordnet_gloss.tsv` | words of a sense | its definition | WordNet 3.0 |
| `wordnet_example.tsv` | definition | sentence that uses the word | WordNet 3.0 |
| `foldoc.tsv` | headword | dictionary entry | GFDL 1.1 or later |
| `sentence.tsv` | a sentence of a long description | that description | DFSG-free, by package |
| `heldout/` | | BEIR layout: Debian pairs that no training file holds | as above |
| `SOURCES.json` | | counts, versions and SHA-256 of every file | |

The held-out pairs are drawn by the SHA-256 of the package name, and every training pair that shares
its query or its document with one of them is dropped. Of packages whose texts begin alike (parts of
one program) one is kept. Pairs stand in the order of their SHA-256. The same lists give the same
bytes.
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
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGES = ("wordnet-base", "dict-foldoc")
MIN_DISTINCT_WORDS = 20
MAX_DOCUMENT_CHARACTERS = 4000
MIN_ENTRY_WORDS = 5
MIN_EXAMPLE_WORDS = 3
SENTENCE_WORDS = range(5, 31)
ALIKE_WORDS = 10
BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

Pair = tuple[str, str]


def read_stanzas(text: str) -> Iterator[dict[str, str]]:
    """Paragraphs of a Debian control file as field -> value; continuation lines lose one space."""
    for paragraph in text.split("\n\n"):
        fields: dict[str, str] = {}
        key = ""
        for line in paragraph.split("\n"):
            if line[:1] in {" ", "\t"} and key:
                fields[key] += "\n" + line[1:]
            elif ":" in line:
                key, _, value = line.partition(":")
                fields[key] = value.strip()
        if fields:
            yield fields


def squeeze(text: str) -> str:
    """The text on one line, as a TSV field wants it."""
    return " ".join(text.split())


def fetch_descriptions(cache: Path) -> tuple[str, str]:
    """English descriptions of the stable suite and its release date, through apt."""
    lists = cache / "lists"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    options = ["-o", f"Dir::State::lists={lists}", "-o", "Acquire::Languages=en"]
    subprocess.run(["apt-get", "update", "-q", *options], check=True, stdout=sys.stderr)
    found = [
        path
        for path in sorted(lists.glob("*_debian_dists_*_main_i18n_Translation-en*"))
        if "-updates_" not in path.name and "-backports_" not in path.name
    ]
    if not found:
        raise SystemExit("apt fetched no English descriptions; are its sources Debian's?")
    helper = ["/usr/lib/apt/apt-helper", "cat-file", str(found[0])]
    text = subprocess.run(helper, check=True, capture_output=True).stdout.decode("utf-8")
    suite = found[0].name.split("_dists_")[1].split("_")[0]
    release = next(iter(lists.glob(f"*_debian_dists_{suite}_InRelease")))
    dated = re.search(r"^Date: (.*)$", release.read_text("utf-8"), re.MULTILINE)
    return text, f"{suite}, release file of {dated.group(1) if dated else '?'}"


def fetch_package(cache: Path, name: str) -> Path:
    """The `.deb` of a package, downloaded once."""
    if not list(cache.glob(f"{name}_*.deb")):
        subprocess.run(
            ["apt-get", "download", "-q", name], check=True, cwd=cache, stdout=sys.stderr
        )
    return sorted(cache.glob(f"{name}_*.deb"))[-1]


def read_member(package: Path, member: str) -> bytes:
    """One file of a `.deb`."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    files = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(files)) as archive:
        found = archive.extractfile(member)
        if found is None:
            raise SystemExit(f"{package} holds no {member}.")
        return found.read()


def read_debian(descriptions: str) -> Iterator[tuple[str, Pair]]:
    """Package name and (short description, long description)."""
    for stanza in read_stanzas(descriptions):
        short, _, rest = stanza.get("Description-en", "").partition("\n")
        lines = [line for line in rest.split("\n") if line.strip() != "."]
        document = squeeze(" ".join(re.sub(r"^\s*[-*+•] ", " ", line) for line in lines))
        document = document[:MAX_DOCUMENT_CHARACTERS]
        enough = len(set(document.lower().split())) >= MIN_DISTINCT_WORDS
        if enough and "dummy" not in short and "transitional" not in short:
            yield stanza["Package"], (squeeze(short), document)


def split_gloss(gloss: str) -> tuple[str, list[str]]:
    """Definition and quoted examples of a WordNet gloss."""
    examples = [squeeze(text) for text in re.findall(r'"([^"]+)"', gloss)]
    definition = re.split(r';?\s*"', gloss, maxsplit=1)[0]
    return squeeze(definition).rstrip(" ;:"), examples


def read_wordnet(data: str) -> Iterator[tuple[str, str, list[str]]]:
    """Words, definition and examples of every sense in a WordNet `data.*` file."""
    for line in data.split("\n"):
        if not line or line.startswith("  "):
            continue
        head, _, gloss = line.partition("|")
        fields = head.split()
        count = int(fields[3], 16)
        words = [re.sub(r"\([a-z]+\)$", "", fields[4 + 2 * i]) for i in range(count)]
        definition, examples = split_gloss(gloss)
        yield ", ".join(word.replace("_", " ") for word in words), definition, examples


def decode_base64(digits: str) -> int:
    """A number as dictd's index writes it."""
    value = 0
    for digit in digits:
        value = value * 64 + BASE64.index(digit)
    return value


def read_foldoc(index: str, entries: bytes) -> Iterator[Pair]:
    """Headword and entry; cross-reference braces, dates and field marks go."""
    for line in index.split("\n"):
        word, _, place = line.partition("\t")
        if word.startswith("00-database") or not place:
            continue
        start, length = (decode_base64(digits) for digits in place.split("\t"))
        body = entries[start : start + length].decode("utf-8", "replace")
        title, _, text = body.partition("\n")
        text = re.sub(r"\((?:19|20)\d\d-\d\d-\d\d\)", " ", text.replace("{", "").replace("}", ""))
        text = squeeze(re.sub(r"^\s*(?:\d\. )?<[^>]*>", " ", text, flags=re.MULTILINE))
        if len(text.split()) >= MIN_ENTRY_WORDS:
            yield squeeze(title), text[:MAX_DOCUMENT_CHARACTERS]


def drop_repeats(pairs: Iterable[Pair], seen: set[str]) -> list[Pair]:
    """Pairs whose query and document are new; `seen` grows by their lower-case texts."""
    kept = []
    for query, document in pairs:
        keys = (query.lower(), document.lower())
        if query and document and not seen.intersection(keys):
            seen.update(keys)
            kept.append((query, document))
    return kept


def drop_twins(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Pairs whose document's first words, and query's first clause, are new."""
    seen: set[str] = set()
    for query, document in pairs:
        opening = " ".join(document.lower().split()[:ALIKE_WORDS])
        clause = re.split(r"[;(]| - ", query.lower())[0].strip()
        if not seen.intersection((opening, clause)):
            yield query, document
        seen.update((opening, clause))


def pick_sentence(document: str) -> str | None:
    """A sentence of the document, chosen by its SHA-256, or None."""
    sentences = re.split(r"(?<=[.?!])\s+", document)
    fitting = [text for text in sentences if len(text.split()) in SENTENCE_WORDS]
    return fitting[int(draw((document, "")), 16) % len(fitting)] if fitting else None


def draw(pair: Pair) -> str:
    """The place in the lottery: SHA-256 of both texts."""
    return hashlib.sha256("\t".join(pair).encode()).hexdigest()


def split_debian(
    named: list[tuple[str, Pair]], held: int
) -> tuple[list[tuple[str, Pair]], list[Pair]]:
    """Held-out pairs with their names, and the pairs left to train on.

    A long description that several packages share (front ends, language packs) stays out of the
    held-out part, where it would have several right answers.
    """
    counts: dict[str, int] = {}
    for _, pair in named:
        for text in pair:
            counts[text.lower()] = counts.get(text.lower(), 0) + 1
    drawn = sorted(named, key=lambda item: hashlib.sha256(item[0].encode()).hexdigest())
    lone = [item for item in drawn if all(counts[text.lower()] == 1 for text in item[1])][:held]
    names = {name for name, _ in lone}
    return lone, [pair for name, pair in drawn if name not in names]


def write_beir(folder: Path, named: list[tuple[str, Pair]]) -> None:
    """Pairs as corpus, queries and judgements."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for file, column in (("queries.jsonl", 0), ("corpus.jsonl", 1)):
        rows = ({"_id": name, "text": pair[column]} for name, pair in named)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / file).write_text(text, "utf-8")
    judged = "".join(f"{name}\t{name}\t1\n" for name, _ in named)
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}", "utf-8")


def main() -> None:
    """Fetch, pair, split, write; say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True, help="folder for fetched files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pairs")
    parser.add_argument(
        "--held-out", type=int, default=2000, help="Debian pairs kept for evaluation"
    )
    arguments = parser.parse_args()

    descriptions, release = fetch_descriptions(arguments.cache)
    packages = {name: fetch_package(arguments.cache, name) for name in PACKAGES}
    heldout, debian = split_debian(list(read_debian(descriptions)), arguments.held_out)

    wordnet = "./usr/share/wordnet/data."
    senses = [
        sense
        for part in ("noun", "verb", "adj", "adv")
        for sense in read_wordnet(read_member(packages["wordnet-base"], wordnet + part).decode())
    ]
    dictionary = "./usr/share/dictd/foldoc."
    index = read_member(packages["dict-foldoc"], f"{dictionary}index").decode()
    entries = gzip.decompress(read_member(packages["dict-foldoc"], f"{dictionary}dict.dz"))

    seen = {text.lower() for _, pair in heldout for text in pair}
    described = drop_repeats(drop_twins(debian), set(seen))
    sentences = ((pick_sentence(document), document) for _, document in described)
    files = {
        "debian.tsv": described,
        "sentence.tsv": [(query, document) for query, document in sentences if query],
        "wordnet_gloss.tsv": drop_repeats(
            ((words, definition) for words, definition, _ in senses), set(seen)
        ),
        "wordnet_example.tsv": drop_repeats(
            (
                (definition, example)
                for _, definition, examples in senses
                for example in examples[:1]
                if len(example.split()) >= MIN_EXAMPLE_WORDS
            ),
            set(seen),
        ),
        "foldoc.tsv": drop_repeats(read_foldoc(index, entries), set(seen)),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, pairs in files.items():
        pairs.sort(key=draw)
        text = "".join(f"{query}\t{document}\n" for query, document in pairs)
        (arguments.out / name).write_text(text, "utf-8")
    write_beir(arguments.out / "heldout", heldout)
    written = sorted(path for path in arguments.out.rglob("*") if path.suffix in {".tsv", ".jsonl"})
    summary = {
        "debian": release,
        "packages": {name: path.name for name, path in packages.items()},
        "pairs": {name: len(pairs) for name, pairs in files.items()} | {"heldout": len(heldout)},
        "sha256": {
            str(path.relative_to(arguments.out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in written
        },
    }
    text = json.dumps(summary, indent=2) + "\n"
    (arguments.out / "SOURCES.json").write_text(text, "utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
