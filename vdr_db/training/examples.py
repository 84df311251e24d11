"""Training examples out of files: four formats, and errors that name the line.

| format | a line or record | negatives | teacher scores |
|---|---|---|---|
| `pairs` (`.tsv`) | query, positive, any number of negatives between tabs; no header | yes | no |
| `dpr` (`.jsonl`) | `question`, `positive_ctxs`, `hard_negative_ctxs`, `negative_ctxs` | yes | no |
| `scored` (`.jsonl`) | `query`, `positives`, `negatives`, `scores` | yes | yes |
| `beir` (folder) | a judged query and the documents with a grade above 0 | no | no |

`scores` belong to the first positive and then the negatives, in order. Files may be
packed with gzip or zstd.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vdr_db.errors import ConfigError, InputError
from vdr_db.lines import checked_line, lines_of, unpacked_name
from vdr_db.readers import BeirFolder, json_rows

__all__ = ["FORMATS", "Example", "Format", "Source", "read_examples"]

Format = Literal["pairs", "dpr", "scored", "beir"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Example:
    """A query with what answers it and what does not.

    Attributes:
        query: Not empty.
        positives: At least one text, none empty.
        negatives: Texts that do not answer it, none empty.
        scores: The teacher's for the first positive and each negative, or None.
        source: `FILE:LINE`.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None
    source: str = ""


@dataclass(frozen=True)
class Source:
    """A file or folder of examples.

    Attributes:
        path: Of the file, or of a BEIR folder.
        format: None tells it from the name and, for JSONL, from the first line.
        weight: Share among all sources, relative to their number of examples: at 2 each example
            comes twice as often as at 1.
        split: Of a BEIR folder's judgements.
    """

    path: Path
    format: Format | None = None
    weight: float = 1.0
    split: str = "train"


def read_examples(
    source: Source, *, on_bad: Callable[[InputError], None] | None = None
) -> Iterator[Example]:
    """Examples of one source in file order.

    Args:
        source: What to read.
        on_bad: Called with the error of each bad record, which is then left out; None raises it.

    Raises:
        InputError: The file cannot be read or a record is bad; the message names file and line.
        ConfigError: The format cannot be told.
    """
    format = source.format or _guess(source.path)
    if format not in FORMATS:
        raise ConfigError(f"`format` must be one of {FORMATS}, got {format!r}.")
    rows = _judged_queries(source) if format == "beir" else _rows(source.path, format, on_bad)
    for row, where in rows:
        try:
            example = _PARSERS[format](row, where)
        except InputError as error:
            if on_bad is None:
                raise
            on_bad(error)
            continue
        yield example


def _guess(path: Path) -> Format:
    if path.is_dir():
        return "beir"
    name = unpacked_name(path)
    if name.endswith(".tsv"):
        return "pairs"
    if name.endswith(".jsonl"):
        first, _ = next(json_rows(path), ({}, ""))
        return "scored" if isinstance(first, dict) and "query" in first else "dpr"
    raise ConfigError(
        f"{path}: cannot tell the format of this training file; expected a BEIR folder, .tsv or "
        f".jsonl (and .gz or .zst), or set `format` to one of {FORMATS}."
    )


def _rows(
    path: Path, format: Format, on_bad: Callable[[InputError], None] | None
) -> Iterator[tuple[Any, str]]:
    """Parsed lines with `FILE:LINE`; a line that is no JSON goes to `on_bad`."""
    for number, line in lines_of(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        checked_line(line, where)
        if format == "pairs":
            yield line.rstrip("\r\n").split("\t"), where
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            bad = InputError(f"{where}: not a line of JSON: {error}.")
            if on_bad is None:
                raise bad from error
            on_bad(bad)
            continue
        yield row, where


def _parse_pair(cells: list[str], where: str) -> Example:
    if len(cells) < 2:
        raise InputError(
            f"{where}: expected query and positive between tabs, and negatives after them, got "
            f"{len(cells)} cell; a training TSV has no header and no quoting."
        )
    query, positive, *negatives = cells
    return _checked(query, [positive], negatives, None, where)


def _parse_dpr(row: Any, where: str) -> Example:
    lists = ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")
    fields = _fields(row, where, ("question", "positive_ctxs"), lists)
    positives, hard, others = (
        [_context(context, name, where) for context in fields[name]] for name in lists
    )
    return _checked(fields["question"], positives, hard + others, None, where)


def _context(context: Any, name: str, where: str) -> str:
    fields = context if isinstance(context, dict) else {}
    text, title = fields.get("text"), fields.get("title") or ""
    if not isinstance(text, str) or not isinstance(title, str):
        raise InputError(
            f"{where}: every item of {name!r} must be an object with a `text` (and perhaps a "
            f"`title`), got {str(context)[:60]}."
        )
    return f"{title} {text}".strip() if title else text


def _parse_scored(row: Any, where: str) -> Example:
    fields = _fields(row, where, ("query", "positives"), ("positives", "negatives"))
    negatives, scores = fields["negatives"], fields.get("scores")
    if scores is not None:
        wanted = 1 + len(negatives)
        is_list = isinstance(scores, list) and len(scores) == wanted
        if not is_list or not all(_is_number(value) for value in scores):
            raise InputError(
                f"{where}: 'scores' must be {wanted} finite numbers, one for the first positive "
                f"and one for each negative, got {str(scores)[:60]}."
            )
        scores = tuple(float(value) for value in scores)
    return _checked(fields["query"], fields["positives"], negatives, scores, where)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_PARSERS: dict[str, Callable[[Any, str], Example]] = {
    "pairs": _parse_pair,
    "dpr": _parse_dpr,
    "scored": _parse_scored,
    "beir": lambda row, where: _checked(row[0], row[1], [], None, where),
}


def _fields(row: Any, where: str, needed: tuple[str, ...], lists: tuple[str, ...]) -> Any:
    """The record with an empty list for each list it lacks."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected one JSON object a line, got {type(row).__name__}.")
    for name in needed:
        if name not in row:
            known = ", ".join(map(repr, row)) or "no field"
            raise InputError(f"{where}: the field {name!r} is missing; this record has {known}.")
    row = {**row, **{name: row.get(name) or [] for name in lists}}
    for name in lists:
        if not isinstance(row[name], list):
            kind = type(row[name]).__name__
            raise InputError(f"{where}: {name!r} must be a list, got {kind}.")
    return row


def _checked(
    query: Any,
    positives: list[Any],
    negatives: list[Any],
    scores: tuple[float, ...] | None,
    where: str,
) -> Example:
    if not positives:
        raise InputError(f"{where}: expected at least one positive, got none.")
    for name, text in (
        ("query", query),
        *(("positive", text) for text in positives),
        *(("negative", text) for text in negatives),
    ):
        if not isinstance(text, str):
            raise InputError(f"{where}: the {name} must be a text, got {type(text).__name__}.")
        if not text.strip():
            raise InputError(f"{where}: the {name} must not be empty.")
    return Example(query, tuple(positives), tuple(negatives), scores, where)


def _judged_queries(source: Source) -> Iterator[tuple[Any, str]]:
    """Judged queries with their documents' texts, the best grade first."""
    folder = BeirFolder(source.path, split=source.split)
    judged = folder.judgements()
    wanted = {doc for grades in judged.values() for doc, grade in grades.items() if grade > 0}
    texts = {str(r.id): r.text for r in folder.documents() if str(r.id) in wanted}
    for query in folder.queries():
        grades = judged.get(str(query.id), {})
        best = sorted((-grade, doc) for doc, grade in grades.items() if grade > 0 and doc in texts)
        if best:
            yield (query.text, [texts[doc] for _, doc in best]), query.source
