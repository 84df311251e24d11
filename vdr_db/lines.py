"""Lines of text files, packed with gzip or zstd or not, in UTF-8."""

from __future__ import annotations

import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeAlias, cast

from vdr_db.budget import BUDGET, Budget
from vdr_db.errors import InputError, require

__all__ = ["PACKED", "Row", "checked_line", "lines_of", "shown", "unpacked_name"]

PACKED = (".gz", ".zst")
"""Ends of names of packed files; what a file is, its first bytes tell."""

Row: TypeAlias = tuple[dict[str, Any] | InputError, str]
"""What a record is made of, or why there is nothing, and `"FILE:LINE"`."""

_PEEKED = 1 << 16
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def unpacked_name(path: str | os.PathLike[str]) -> str:
    """The name of a file without the end that tells how it is packed, in lower case."""
    name = os.path.basename(os.fspath(path)).lower()
    for end in PACKED:
        name = name.removesuffix(end)
    return name


def shown(path: str | os.PathLike[str]) -> str:
    """What a file is called in messages, sources and ids; bytes that are no UTF-8 are escaped."""
    name = os.fspath(path)
    return "<stdin>" if name == "-" else os.fsencode(name).decode("utf-8", "backslashreplace")


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """The bytes of a file or of standard input, unpacked when they are gzip or zstd."""
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
        yield _unpacked(raw)
    finally:
        if not from_stdin:
            raw.close()


def _unpacked(raw: IO[bytes]) -> IO[bytes]:
    first = cast(Any, raw).peek(4)[:4]
    if first.startswith(_GZIP):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if first == _ZSTD:
        stream: IO[bytes] = require("pyarrow", "parquet").CompressedInputStream(raw, "zstd")
        return stream
    return raw


def lines_of(path: str | os.PathLike[str], *, budget: Budget = BUDGET) -> Iterator[tuple[int, str]]:
    """Line number from 1 and line, with its line end; byte order marks in front are dropped.

    Bytes that are not UTF-8 become lone surrogates, which `checked_line` tells. A line that is
    longer than the budget ends the file with an error, before the rest of it is unpacked.
    """
    name = shown(path)
    number, most = 0, budget.line_characters
    with _opened(path) as stream:
        buffered = io.BufferedReader(cast(Any, stream), _PEEKED)
        try:
            # Files of old programs end their lines in CR alone; then there is no LF at all.
            head = buffered.peek(_PEEKED)
            end = "\r" if b"\r" in head and b"\n" not in head else "\n"
            text = io.TextIOWrapper(buffered, "utf-8", errors="surrogateescape", newline=end)
            for number, line in enumerate(iter(lambda: text.readline(most + 1), ""), start=1):
                if len(line) > most:
                    raise InputError(
                        f"{name}:{number}: the line has more than {most:,} characters; cut it into "
                        "several records, or check that this is a file of lines."
                    )
                yield number, line.removeprefix("\ufeff")
            text.detach()
        except (EOFError, OSError, zlib.error) as error:
            # Whatever comes of a disk has a number, and what unpackers say has none.
            if isinstance(error, OSError) and error.errno is not None:
                raise InputError(
                    f"{name}:{number + 1}: cannot be read: {error.strerror}."
                ) from error
            raise InputError(
                f"{name}:{number + 1}: the packed data ends early or is damaged ({error}); "
                "fetch the file again."
            ) from error


def checked_line(line: str, source: str) -> str:
    """A line whose bytes were UTF-8.

    Raises:
        InputError: They were not.
    """
    try:
        if not line.isascii():
            line.encode()
    except UnicodeEncodeError as error:
        column = len(line[: error.start].encode("utf-8", "surrogateescape")) + 1
        raise InputError(
            f"{source}: byte 0x{ord(line[error.start]) - 0xDC00:02x} at column {column} is not "
            "UTF-8; convert the file to UTF-8 (iconv -f LATIN1 -t UTF-8, if it is Latin-1)."
        ) from error
    return line
