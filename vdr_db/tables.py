"""Rows of CSV and TSV files, with columns of numbers as numbers.

The delimiter of a CSV file is seen from its first line: a comma, or a semicolon or tab where there
is no comma; a line `sep=;` of a spreadsheet goes before. A column is `int`, `float` or `bool` where
every cell of the whole file that is not empty reads so, which takes a pass of its own; anything
else stays text, as do numbers with leading zeros, dates, and columns of ids and texts. An empty
cell of a typed column leaves the field out. Standard input cannot be read twice: its columns are
text unless `Fields` says their kinds.
"""

from __future__ import annotations

import csv
import math
import os
import re
import sys
from collections.abc import Container, Iterator, Mapping
from itertools import chain
from typing import Literal, TypeAlias

from vdr_db.budget import BUDGET, Budget
from vdr_db.errors import InputError
from vdr_db.filters import EXACT_INTEGERS
from vdr_db.lines import Row, checked_line, lines_of, shown

__all__ = ["Kind", "table_rows"]

Kind = Literal["int", "float", "bool", "text"]
Value: TypeAlias = str | int | float | bool

_INT = re.compile(r"-?(0|[1-9]\d{0,18})")
_FLOAT = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_NARROWEST: tuple[Kind, ...] = ("bool", "int", "float")


def table_rows(
    path: str | os.PathLike[str],
    format: Literal["csv", "tsv"],
    *,
    kinds: Mapping[str, Kind],
    texts: Container[str],
    delimiter: str | None = None,
    budget: Budget = BUDGET,
) -> Iterator[Row]:
    """Rows of a table as objects; a row that is wrong comes as its error.

    Args:
        path: The file, `-` for standard input.
        format: A tab-separated file has no quoting.
        kinds: Column → kind of its values, instead of what the whole file suggests.
        texts: Columns that are text in any case.
        delimiter: Between cells; `None` sees from the first line.
        budget: The most that is read of a line and of a row.

    Raises:
        InputError: The header is wrong, a row is too large, or a quotation mark is never closed.
    """
    known = dict(kinds)
    if os.fspath(path) != "-":
        known = {**_kinds_of(path, format, delimiter, {*kinds}, texts, budget), **kinds}
    for header, cells, source in _cells(path, format, delimiter, budget):
        try:
            yield _row(header, cells, source, known), source
        except InputError as error:
            yield error, source


def _row(
    header: list[str], cells: list[str], source: str, kinds: dict[str, Kind]
) -> dict[str, Value]:
    if len(cells) != len(header):
        raise InputError(
            f"{source}: expected {len(header)} cells as in the header, got {len(cells)}; quote "
            "cells that hold the delimiter, or name another one."
        )
    row: dict[str, Value] = {}
    for name, cell in zip(header, cells, strict=True):
        checked_line(cell, source)
        kind = kinds.get(name, "text")
        if kind == "text":
            row[name] = cell
        elif cell != "":
            value = _value(cell, kind)
            if value is None:
                raise InputError(f"{source}: the column {name!r} is {kind}, got {cell[:40]!r}.")
            row[name] = value
    return row


def _cells(
    path: str | os.PathLike[str],
    format: Literal["csv", "tsv"],
    delimiter: str | None,
    budget: Budget,
) -> Iterator[tuple[list[str], list[str], str]]:
    """Header, cells and `"FILE:LINE"` of each row."""
    # The limit of the library, 128 KiB a cell, is for all readers of the process.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    name = shown(path)
    taken = 0

    def of_a_row() -> Iterator[str]:
        nonlocal taken
        for number, line in lines_of(path, budget=budget):
            taken += len(line)
            if taken > budget.record_characters:
                raise InputError(
                    f"{name}:{number}: a row has more than {budget.record_characters:,} "
                    "characters; close the quotation mark in front of it, or cut it up."
                )
            yield line

    lines = of_a_row()
    first = next(lines, "")
    skipped = 0
    if format == "csv" and (told := re.fullmatch(r"sep=(.)[\r\n]*", first)) is not None:
        delimiter, skipped, first = delimiter or told[1], 1, next(lines, "")
    if delimiter is None:
        delimiter = "\t" if format == "tsv" else _delimiter_of(first)
    # A tab-separated file has no quoting: a quotation mark in it is a character like any other.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if format == "tsv" else csv.QUOTE_MINIMAL
    reader = csv.reader(
        chain([first] if first else [], lines), delimiter=delimiter, quoting=quoting, strict=True
    )
    header: list[str] | None = None
    while True:
        source = f"{name}:{reader.line_num + skipped + 1}"
        try:
            cells, taken = next(reader, None), 0
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
            yield header, cells, source


def _delimiter_of(line: str) -> str:
    unquoted = re.sub(r'"[^"]*"', "", line)
    return next((one for one in ",;\t" if one in unquoted), ",")


def _kinds_of(
    path: str | os.PathLike[str],
    format: Literal["csv", "tsv"],
    delimiter: str | None,
    told: set[str],
    texts: Container[str],
    budget: Budget,
) -> dict[str, Kind]:
    """Kind of each column of numbers or truths, but for those that are told or are texts."""
    possible: dict[str, set[Kind]] | None = None
    seen: set[str] = set()
    for header, cells, _ in _cells(path, format, delimiter, budget):
        if possible is None:
            names = (name for name in header if name not in told and name not in texts)
            possible = {name: set(_NARROWEST) for name in names}
        if not any(possible.values()):
            break
        for name, cell in zip(header, cells, strict=False):
            if cell and (kinds := possible.get(name)):
                seen.add(name)
                kinds -= {kind for kind in kinds if _value(cell, kind) is None}
    return {
        name: next(kind for kind in _NARROWEST if kind in kinds)
        for name, kinds in (possible or {}).items()
        if kinds and name in seen
    }


def _value(cell: str, kind: Kind) -> Value | None:
    """A cell as what it says, `None` when it is of another kind."""
    if kind == "text":
        return cell
    if kind == "bool":
        return {"true": True, "false": False}.get(cell.lower())
    if kind == "int":
        number = int(cell) if _INT.fullmatch(cell) else None
        return number if number is not None and -(2**63) <= number < 2**63 else None
    real = float(cell) if _FLOAT.fullmatch(cell) else math.inf
    # A whole number that float64 cannot tell from its neighbours, such as a long key, stays text.
    is_exact = abs(real) <= EXACT_INTEGERS or "." in cell or "e" in cell.lower()
    return real if math.isfinite(real) and is_exact else None
