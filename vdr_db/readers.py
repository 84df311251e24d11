"""Texts from files, one record at a time: JSONL, CSV, TSV, plain lines and BEIR folders.

Any file may be packed with gzip, or with zstd where pyarrow is installed (its first bytes tell,
whatever its name), and `-` is standard input. Nothing is held but the current line, and, where ids
must be unique, the ids. Every error is an `InputError` that names file and line; what is wrong with
one record alone can be taken as a record with a `fault` instead. Lines may end in LF, CR LF, or CR
alone.

What a record is made of, unless the caller names fields:

- id: the field `_id` or `id`; without either, `FILE:LINE`, which stays the same from run to run.
- text: the field `text`, with `title` and one space in front of it when the record has a title.
  That is how BEIR's own baselines join the two.
- payload: everything but the id and the last field of the text; so `title` is kept.

A field inside of an object is named by its path, `content.body`, unless one has that very name.
Tables are the business of `vdr_db.tables`.

Source: BEIR folder layout, https://github.com/beir-cellar/beir/wiki/Load-your-custom-dataset
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from vdr_db.errors import ConfigError, InputError
from vdr_db.lines import PACKED, Row, checked_line, lines_of, shown, unpacked_name
from vdr_db.tables import Kind, table_rows

__all__ = [
    "BeirFolder",
    "Fields",
    "Format",
    "Kind",
    "Record",
    "json_rows",
    "read_records",
    "record_of",
]

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
        fault: Why there is no text, for a record that could not be read; its id is the source.
    """

    id: int | str
    text: str
    payload: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Fields:
    """Which fields of a JSON object or table row become id, text and payload.

    Attributes:
        id: Field of the id, or `None` for `_id`, `id`, else `FILE:LINE`.
        text: Fields of the text, joined by one space, empty ones left out; every record must have
            them all. Empty tuple: `text`, with `title` in front when the record has one.
        payload: Fields kept as payload, those a record lacks left out; `None` keeps all but the id
            and the last field of the text.
        kinds: Column of a table → kind of its values, instead of what the whole file suggests.
        delimiter: Between the cells of a table; `None` sees from its first line.
    """

    id: str | None = None
    text: tuple[str, ...] = ()
    payload: tuple[str, ...] | None = None
    kinds: tuple[tuple[str, Kind], ...] = ()
    delimiter: str | None = None

    def __post_init__(self) -> None:
        """Refuses the string that was meant as a tuple of one."""
        for name in ("text", "payload"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise TypeError(f"`{name}` must be a tuple of field names; write ({given!r},).")
        for column, kind in self.kinds:
            if kind not in get_args(Kind):
                raise ConfigError(
                    f"the kind of column {column!r} must be one of {', '.join(get_args(Kind))}, "
                    f"got {kind!r}."
                )
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise ConfigError(f"`delimiter` must be one character, got {self.delimiter!r}.")


def read_records(
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    fields: Fields | None = None,
    unique: bool = False,
    lenient: bool = False,
) -> Iterator[Record]:
    """Records of one file, of standard input (`-`), or of a BEIR folder's corpus.

    Args:
        path: File, folder, or `-`.
        format: `"jsonl"`, `"csv"`, `"tsv"`, `"text"` (one text a line) or `"beir"`; `None` decides
            by the file name, JSONL for standard input. Blank lines of JSONL and text are skipped.
        fields: Where id, text and payload are; see `Fields`. Plain lines have none.
        unique: Whether a second record with the same id is an error. Holds every id in memory.
        lenient: Yield a record with a `fault` where one cannot be read, and go on.

    Yields:
        Records in file order.

    Raises:
        ConfigError: The format cannot be told from the name, or is unknown.
        InputError: The file cannot be read, or a line of it is wrong; the message names the line.
    """
    chosen = _format_of(path, format)
    fields = fields or Fields()
    if chosen == "beir":
        records: Iterable[Record] = BeirFolder(path)._corpus(fields, lenient=lenient)
    elif chosen == "text":
        records = _records(_text_rows(path), Fields(text=("text",), payload=()), lenient)
    elif chosen == "jsonl":
        records = _records(json_rows(path), fields, lenient)
    else:
        rows = table_rows(
            path,
            chosen,
            kinds=dict(fields.kinds),
            texts={fields.id or "id", *(fields.text or ("title", "text")), "_id", "id"},
            delimiter=fields.delimiter,
        )
        records = _records(rows, fields, lenient)
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
        for number, line in lines_of(path):
            checked_line(line, f"{path}:{number}")
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

    def _corpus(self, fields: Fields, *, lenient: bool = False) -> Iterator[Record]:
        return self._records("corpus.jsonl", fields, lenient)

    def _records(self, name: str, fields: Fields, lenient: bool = False) -> Iterator[Record]:
        # Judgement files know text ids only, so a number is read as its digits.
        for record in _records(json_rows(self._file(name)), fields, lenient):
            yield replace(record, id=str(record.id))

    def _file(self, name: str) -> Path:
        for candidate in (self.path / f"{name}{end}" for end in ("", *PACKED)):
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
    suffix = os.path.splitext(unpacked_name(path))[1]
    if suffix not in _SUFFIXES:
        raise ConfigError(
            f"{os.fspath(path)}: cannot tell the format from the name; "
            f"expected one of {', '.join(_SUFFIXES)} (and .gz or .zst), or pass the format."
        )
    return _SUFFIXES[suffix]


def _records(rows: Iterable[Row], fields: Fields, lenient: bool) -> Iterator[Record]:
    for row, source in rows:
        try:
            if isinstance(row, InputError):
                raise row
            yield record_of(row, fields, source)
        except InputError as error:
            if not lenient:
                raise
            yield Record(source, "", {}, source, str(error).removeprefix(f"{source}: "))


def json_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    """Objects of a JSONL file, blank lines passed over."""
    name = shown(path)
    for number, line in lines_of(path):
        if line.strip():
            source = f"{name}:{number}"
            try:
                yield _json_row(checked_line(line, source), source), source
            except InputError as error:
                yield error, source


def _json_row(line: str, source: str) -> dict[str, Any]:
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
            "a file with one big list must be split into lines (jq -c '.[]')."
        )
    return row


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _text_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    name = shown(path)
    for number, line in lines_of(path):
        if line.strip():
            source = f"{name}:{number}"
            try:
                yield {"text": checked_line(line, source).rstrip("\r\n")}, source
            except InputError as error:
                yield error, source


def _inside(row: dict[str, Any], name: str) -> tuple[bool, Any]:
    """Whether there is such a field, and its value; `a.b` is also the field b of the object a."""
    if name in row:
        return True, row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


def record_of(
    row: dict[str, Any], fields: Fields, source: str, *, missing: str = "missing"
) -> Record:
    """The record of one object, by the rules at the top; `missing` says what an absent field is.

    Raises:
        InputError: A field that is needed is not there, or is of another kind.
    """

    def wanted(name: str, check: Callable[[Any], bool], meaning: str) -> Any:
        is_there, value = _inside(row, name)
        if not is_there:
            raise InputError(
                f"{source}: the field {name!r} is {missing}; this record has "
                f"{', '.join(map(repr, row)) or 'no field'}."
            )
        if not check(value):
            hint = ""
            if isinstance(value, dict) and value:
                hint = f"; name a field in it, such as {name}.{next(iter(value))}"
            raise InputError(
                f"{source}: the field {name!r} must be {meaning}, got {_kind(value)}{hint}."
            )
        return value

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
        found = ((name, *_inside(row, name)) for name in fields.payload)
        payload = {name: value for name, is_there, value in found if is_there}
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
