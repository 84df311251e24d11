"""Texts from files, one record at a time: JSONL, CSV, TSV, plain lines and BEIR folders.

Any file may be gzip-compressed (seen from its first bytes, whatever its name) and `-` is standard
input. Nothing is held but the current line, and, where ids must be unique, the ids. Every error is
an `InputError` that names file and line.

What a record is made of, unless the caller names fields:

- id: the field `_id` or `id`; without either, `FILE:LINE`, which stays the same from run to run.
- text: the field `text`, with `title` and one space in front of it when the record has a title.
  That is how BEIR's own baselines join the two.
- payload: everything but the id and the last field of the text; so `title` is kept.

Source: BEIR folder layout, https://github.com/beir-cellar/beir/wiki/Load-your-custom-dataset
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast, get_args

from vdr_db.errors import ConfigError, InputError

__all__ = ["BeirFolder", "Fields", "Format", "Record", "read_records", "record_of"]

Format = Literal["jsonl", "csv", "tsv", "text", "beir"]

_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".txt": "text",
}


@dataclass(frozen=True)
class Record:
    """One text with its id and what is stored beside it.

    Attributes:
        id: The caller's id.
        text: What is encoded. May be empty.
        payload: JSON-like values stored with the text.
        source: `"FILE:LINE"` of the first line it was read from.
    """

    id: int | str
    text: str
    payload: dict[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Fields:
    """Which fields of a JSON object or table row become id, text and payload.

    Attributes:
        id: Field of the id, or `None` for `_id`, `id`, else `FILE:LINE`.
        text: Fields of the text, joined by one space, empty ones left out; every record must have
            them all. Empty tuple: `text`, with `title` in front when the record has one.
        payload: Fields kept as payload, those a record lacks left out; `None` keeps all but the id
            and the last field of the text.
    """

    id: str | None = None
    text: tuple[str, ...] = ()
    payload: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuses the string that was meant as a tuple of one."""
        for name in ("text", "payload"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise TypeError(f"`{name}` must be a tuple of field names; write ({given!r},).")


def read_records(
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    fields: Fields | None = None,
    unique: bool = False,
) -> Iterator[Record]:
    """Records of one file, of standard input (`-`), or of a BEIR folder's corpus.

    Args:
        path: File, folder, or `-`.
        format: `"jsonl"`, `"csv"`, `"tsv"`, `"text"` (one text a line) or `"beir"`; `None` decides
            by the file name, JSONL for standard input. Blank lines of JSONL and text are skipped.
        fields: Where id, text and payload are; see `Fields`. Plain lines have none.
        unique: Whether a second record with the same id is an error. Holds every id in memory.

    Yields:
        Records in file order.

    Raises:
        ConfigError: The format cannot be told from the name, or is unknown.
        InputError: The file cannot be read, or a line of it is wrong; the message names the line.
    """
    chosen = _format_of(path, format)
    fields = fields or Fields()
    if chosen == "beir":
        records: Iterable[Record] = BeirFolder(path)._corpus(fields)
    elif chosen == "text":
        records = _text_records(path)
    else:
        rows = _json_rows(path) if chosen == "jsonl" else _table_rows(path, chosen)
        records = (record_of(row, fields, source) for row, source in rows)
    return _unique(records) if unique else iter(records)


class BeirFolder:
    """A retrieval test collection in BEIR layout.

    `corpus.jsonl[.gz]` (fields `_id`, `title`, `text`), `queries.jsonl[.gz]` (`_id`, `text`) and
    `qrels/SPLIT.tsv` (query id, document id, grade; with or without the usual header). `split` says
    which judgements; `None` takes `test`, or the only split there is.

    Raises `InputError` where a file or split is missing, a line is wrong, or an id comes twice.
    """

    def __init__(self, path: str | os.PathLike[str], *, split: str | None = None) -> None:
        self.path = Path(path)
        self.split = split
        self._file("corpus.jsonl")

    def documents(self) -> Iterator[Record]:
        """The corpus; the payload holds `title` and `metadata` where the file does."""
        return _unique(self._corpus(Fields()))

    def queries(self) -> Iterator[Record]:
        """All queries, judged or not."""
        return _unique(self._records("queries.jsonl", Fields()))

    def judgements(self) -> dict[str, dict[str, int]]:
        """Grades of the chosen split as query id -> document id -> grade."""
        path = self._judgements_file()
        grades: dict[str, dict[str, int]] = {}
        for number, line in _lines(path):
            cells = line.rstrip("\r\n").split("\t")
            if cells == [""] or (number == 1 and cells[0].lower().replace("_", "-") == "query-id"):
                continue
            where = f"{path}:{number}"
            if len(cells) != 3:
                raise InputError(
                    f"{where}: expected query id, document id and grade between tabs, "
                    f"got {len(cells)} cells."
                )
            query, document, grade = cells
            try:
                value = int(grade)
            except ValueError:
                raise InputError(
                    f"{where}: the grade must be a whole number, got {grade!r}."
                ) from None
            if grades.setdefault(query, {}).setdefault(document, value) != value:
                raise InputError(
                    f"{where}: document {document!r} is judged twice for query {query!r}, as "
                    f"{grades[query][document]} and {value}; keep one."
                )
        return grades

    def _corpus(self, fields: Fields) -> Iterator[Record]:
        return self._records("corpus.jsonl", fields)

    def _records(self, name: str, fields: Fields) -> Iterator[Record]:
        # Judgement files know text ids only, so a number is read as its digits.
        for row, source in _json_rows(self._file(name)):
            record = record_of(row, fields, source)
            yield Record(str(record.id), record.text, record.payload, record.source)

    def _file(self, name: str) -> Path:
        for candidate in (self.path / name, self.path / f"{name}.gz"):
            if candidate.is_file():
                return candidate
        raise InputError(
            f"{self.path} is not a BEIR folder: expected a file {name} or {name}.gz in it."
        )

    def _judgements_file(self) -> Path:
        folder = self.path / "qrels"
        splits = {path.name.split(".")[0]: path for path in sorted(folder.glob("*.tsv*"))}
        split = self.split
        if split is None:
            split = next(iter(splits)) if len(splits) == 1 else "test"
        if split not in splits:
            raise InputError(
                f"{folder} has no judgements {split!r}: it holds "
                f"{', '.join(splits) or 'no .tsv file'}; name one of its splits."
            )
        return splits[split]


def _format_of(path: str | os.PathLike[str], format: Format | None) -> Format:
    if format is not None:
        if format not in get_args(Format):
            known = ", ".join(get_args(Format))
            raise ConfigError(f"`format` must be one of {known}, got {format!r}.")
        return format
    if os.fspath(path) == "-":
        return "jsonl"
    if os.path.isdir(path):
        return "beir"
    name = Path(path).name.lower().removesuffix(".gz")
    suffix = os.path.splitext(name)[1]
    if suffix not in _SUFFIXES:
        raise ConfigError(
            f"{os.fspath(path)}: cannot tell the format from the name; "
            f"expected one of {', '.join(_SUFFIXES)} (and .gz), or pass the format."
        )
    return _SUFFIXES[suffix]


def _shown(path: str | os.PathLike[str]) -> str:
    return "<stdin>" if os.fspath(path) == "-" else os.fspath(path)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """The bytes of a file or of standard input, unpacked when they are gzip."""
    from_stdin = os.fspath(path) == "-"
    if from_stdin and sys.stdin is None:
        raise InputError(
            "standard input is closed; pipe the input into the command, or name a file."
        )
    try:
        raw = sys.stdin.buffer if from_stdin else open(path, "rb")  # noqa: SIM115, closed below
    except OSError as error:
        raise InputError(f"{os.fspath(path)}: cannot be read: {error.strerror}.") from error
    try:
        is_gzip = cast(Any, raw).peek(2)[:2] == b"\x1f\x8b"
        yield cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if is_gzip else raw
    finally:
        if not from_stdin:
            raw.close()


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Line number from 1 and line, with its line end; a byte order mark is dropped."""
    name = _shown(path)
    number = 0
    with _opened(path) as stream:
        lines = iter(stream)
        while True:
            number += 1
            try:
                line = next(lines, None)
                if line is None:
                    return
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad = error.object[error.start]
                raise InputError(
                    f"{name}:{number}: byte 0x{bad:02x} at column {error.start + 1} is not UTF-8; "
                    "convert the file to UTF-8."
                ) from error
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise InputError(
                    f"{name}:{number}: the gzip data ends early or is damaged ({error}); "
                    "fetch the file again."
                ) from error
            except OSError as error:
                raise InputError(f"{name}:{number}: cannot be read: {error.strerror}.") from error
            yield number, text


def _json_rows(path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Any], str]]:
    name = _shown(path)
    for number, line in _lines(path):
        if not line.strip():
            continue
        source = f"{name}:{number}"
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
            if "\\ud" in line.lower():
                json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{source}: holds half of a surrogate pair (\\uD800 to \\uDFFF), which no store "
                "can keep; write the whole character."
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}: not a line of JSON: {error}.") from error
        if not isinstance(row, dict):
            raise InputError(
                f"{source}: expected one JSON object a line, got {_kind(row)}; "
                "a file with one big list must be split into lines."
            )
        yield row, source


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _table_rows(
    path: str | os.PathLike[str], format: Literal["csv", "tsv"]
) -> Iterator[tuple[dict[str, Any], str]]:
    name = _shown(path)
    lines = (line for _, line in _lines(path))
    # A tab-separated file has no quoting: a quotation mark in it is a character like any other.
    reader = (
        csv.reader(lines, strict=True)
        if format == "csv"
        else csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    )
    header: list[str] | None = None
    while True:
        source = f"{name}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{source}: not a row of {format.upper()}: {error}.") from error
        if cells is None:
            return
        if header is None:
            header = cells
            twice = sorted({cell for cell in header if header.count(cell) > 1})
            if twice:
                raise InputError(f"{source}: the header names {', '.join(twice)} more than once.")
        elif cells:
            if len(cells) != len(header):
                raise InputError(
                    f"{source}: expected {len(header)} cells as in the header, got {len(cells)}."
                )
            yield dict(zip(header, cells, strict=True)), source


def _text_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    name = _shown(path)
    for number, line in _lines(path):
        if line.strip():
            source = f"{name}:{number}"
            yield Record(source, line.rstrip("\r\n"), {}, source)


def record_of(
    row: dict[str, Any], fields: Fields, source: str, *, missing: str = "missing"
) -> Record:
    """The record of one object, by the rules at the top; `missing` says what an absent field is.

    Raises:
        InputError: A field that is needed is not there, or is of another kind.
    """

    def wanted(name: str, check: Callable[[Any], bool], meaning: str) -> Any:
        if name not in row:
            raise InputError(
                f"{source}: the field {name!r} is {missing}; this record has "
                f"{', '.join(map(repr, row)) or 'no field'}."
            )
        if not check(row[name]):
            raise InputError(
                f"{source}: the field {name!r} must be {meaning}, got {_kind(row[name])}."
            )
        return row[name]

    id_field = fields.id
    if id_field is None:
        id_field = next((name for name in ("_id", "id") if name in row), None)
    id = source if id_field is None else wanted(id_field, _is_id, "a text or a whole number")
    names: Sequence[str] = fields.text
    if not names:
        titled = row.get("title") is not None
        names = ("title", "text") if titled else ("text",)
    texts = [wanted(name, lambda value: isinstance(value, str), "a text") for name in names]
    if fields.payload is None:
        payload = {name: row[name] for name in row if name not in (id_field, names[-1])}
    else:
        payload = {name: row[name] for name in fields.payload if name in row}
    return Record(id, " ".join(text for text in texts if text), payload, source)


def _is_id(value: Any) -> bool:
    return (isinstance(value, str) and value != "") or type(value) is int


def _kind(value: Any) -> str:
    """What came, in words, for a message."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    if value is None:
        return "null"
    if value == "":
        return "an empty text"
    is_number = isinstance(value, (int, float))
    return names.get(type(value), f"the number {value}" if is_number else type(value).__name__)


def _unique(records: Iterable[Record]) -> Iterator[Record]:
    seen: dict[int | str, str] = {}
    for record in records:
        first = seen.setdefault(record.id, record.source)
        if first != record.source:
            raise InputError(
                f"{record.source}: the id {record.id!r} was already used at {first}; "
                "ids must be unique."
            )
        yield record
