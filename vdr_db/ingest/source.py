"""Where documents come from: files, slices of files for several workers, or any iterable.

A source numbers its records from 0 in reading order. The order is the same in every run, so a
number names a record, and a ledger of numbers is enough to resume.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

from vdr_db.errors import ConfigError, InputError
from vdr_db.ingest.identity import file_identities
from vdr_db.ingest.ledger import Ranges
from vdr_db.ingest.quarantine import Refusal
from vdr_db.lines import PACKED, unpacked_name
from vdr_db.readers import Fields, Format, Record, read_records
from vdr_db.sparse import SparseRows

__all__ = ["Block", "FileSource", "RecordSource", "Slice", "Source", "Window"]

STRIPE = 1024  # records; long enough that a stripe fills encoder batches, short enough to balance
_LONGEST_WINDOW = 16 << 20  # characters
_PARTS = (".jsonl", ".ndjson", ".csv", ".tsv", ".tab", ".txt", ".parquet")


@dataclass(frozen=True)
class Block:
    """Some records that are not settled yet, with their numbers.

    `rows` are vectors made earlier, or `None` when the records must be encoded; `resumed` counts
    settled records that were passed over on the way here.
    """

    numbers: Sequence[int]
    records: Sequence[Record]
    rows: SparseRows | None = None
    resumed: int = 0

    def refusal(self, i: int, reason: str) -> Refusal:
        """The refusal of record `i`."""
        return Refusal(self.numbers[i], self.records[i].id, reason, self.records[i].source)


@dataclass
class Window:
    """How many records are encoded at a time, tuned to take about a second; at most `most`.

    A long window lets the encoder sort by length; a short one bounds what a kill repeats and how
    long Ctrl-C waits. Vectors do not depend on it.
    """

    documents: int = 128
    most: int = 4096

    def took(self, documents: int, seconds: float) -> None:
        """Learns from one window: doubles below half a second, halves above four."""
        if documents >= self.documents and seconds < 0.5:
            self.documents = min(self.most, self.documents * 2)
        elif seconds > 4.0:
            self.documents = max(16, self.documents // 2)


class Source(Protocol):
    """Anything an ingest can read.

    Attributes:
        is_rereadable: Whether `blocks` can be called again and gives the same records.
    """

    is_rereadable: bool

    @property
    def description(self) -> Mapping[str, Any] | None:
        """What identifies the input in a ledger; `None` when nothing does."""

    def blocks(self, settled: Ranges, window: Window) -> Iterator[Block]:
        """The records that are not settled, in order."""
        ...


@dataclass(frozen=True)
class Slice:
    """Part k of n, with k from 0: what one of n independent workers takes."""

    k: int = 0
    n: int = 1

    def __post_init__(self) -> None:
        """Refuses impossible parts."""
        if not 0 <= self.k < self.n:
            raise ConfigError(
                f"a slice k/n needs 0 ≤ k < n, got {self.k}/{self.n}; parts are counted from 0."
            )

    def __str__(self) -> str:
        """`k/n`."""
        return f"{self.k}/{self.n}"

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] | None = None) -> Slice:
        """A slice from `"k/n"`, or from the launcher's environment for `"auto"`.

        `auto` reads `RANK` and `WORLD_SIZE` (torchrun), else `SLURM_PROCID` and `SLURM_NTASKS`
        (srun), else the `SLURM_ARRAY_TASK_*` numbers (job arrays), else takes everything.

        Raises:
            ConfigError: The text is neither, or the numbers are impossible.
        """
        if text == "auto":
            return cls._from_environment(os.environ if environment is None else environment)
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None:
            raise ConfigError(f"a slice is written k/n (such as 0/8) or auto, got {text!r}.")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def _from_environment(cls, environment: Mapping[str, str]) -> Slice:
        def number(name: str) -> int:
            try:
                return int(environment[name])
            except ValueError:
                raise ConfigError(
                    f"the environment variable {name} must be a whole number, "
                    f"got {environment[name]!r}."
                ) from None

        if "RANK" in environment and "WORLD_SIZE" in environment:
            return cls(number("RANK"), number("WORLD_SIZE"))
        # Inside one task of an array every process is task 0 of 1: then the array is the split.
        if "SLURM_PROCID" in environment and number("SLURM_NTASKS") > 1:
            return cls(number("SLURM_PROCID"), number("SLURM_NTASKS"))
        if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
            first = number("SLURM_ARRAY_TASK_MIN") if "SLURM_ARRAY_TASK_MIN" in environment else 0
            return cls(number("SLURM_ARRAY_TASK_ID") - first, number("SLURM_ARRAY_TASK_COUNT"))
        return cls()


class RecordSource:
    """Records from an iterable, or from a function that gives a fresh iterator each time.

    Args:
        records: The records. A function makes the source rereadable: it must yield the same
            records in the same order every time.
        identity: Names the input in a ledger; needed for resuming. Change it when the input does.
    """

    def __init__(
        self,
        records: Iterable[Record] | Callable[[], Iterable[Record]],
        *,
        identity: str | None = None,
    ) -> None:
        if isinstance(records, str):
            raise TypeError(
                "`records` must be an iterable of `Record`, got a str; for a file use FileSource"
            )
        self._records = records
        self.is_rereadable = callable(records)
        self.description: Mapping[str, Any] | None = (
            None if identity is None else {"identity": identity}
        )

    def records(self) -> Iterator[Record]:
        """The records from the start."""
        return iter(self._records() if callable(self._records) else self._records)

    def blocks(self, settled: Ranges, window: Window) -> Iterator[Block]:
        """Windows of the records that are not settled; see `Source`."""
        return cut_windows(self.records(), settled, window)


class FileSource:
    """Records of files in the order given; see `vdr_db.readers` for formats and fields.

    A folder stands for its BEIR corpus, or else for the data files in it, sorted by name. With at
    least n files a slice k/n takes whole files, file i for k = i mod n; with fewer, stripes of
    1,024 records, for which every worker reads everything and keeps its share.

    Args:
        paths: Files, folders, or `-` for standard input.
        format: Format of all files; `None` decides by name. `"parquet"` needs the extra `parquet`.
        fields: Where id, text and payload are.
        slice: The part of this worker.
        digest: Know files in the ledger by SHA-256 of their contents alone, however large they
            are; see `vdr_db.ingest.identity`.
        unique: Whether a second record of a file with the same id is an error. Holds every id in
            memory; Parquet files are not looked at.

    Raises:
        ConfigError: There is no file.
        InputError: A file does not exist.
        TypeError: One str instead of a sequence of paths.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        format: Format | str | None = None,
        fields: Fields | None = None,
        slice: Slice | None = None,
        digest: bool = False,
        unique: bool = False,
    ) -> None:
        if isinstance(paths, (str, os.PathLike)):
            raise TypeError(f"`paths` must be a sequence of paths, got one; write [{paths!r}]")
        self.slice = slice or Slice()
        self._format = format
        self._fields = fields
        self._unique = unique
        self.paths = [part for path in paths for part in _expanded(os.fspath(path))]
        if not self.paths:
            raise ConfigError("`paths` must name at least one file, got none.")
        self._takes_files = len(self.paths) >= self.slice.n
        self.is_rereadable = not any(map(_is_stream, self.paths))
        self._digest = digest

    @cached_property
    def description(self) -> Mapping[str, Any] | None:
        """What identifies the input in a ledger; files are read for it."""
        if not self.is_rereadable:
            return None
        files = [_data_file(path) for path in self.paths]
        return {
            "files": file_identities(files, digest=self._digest),
            "place": [os.path.abspath(file) for file in files],
            "format": self._format,
            "fields": None if self._fields is None else repr(self._fields),
            "slice": str(self.slice),
        }

    def records(self) -> Iterator[Record]:
        """The records of this slice from the start."""
        if self._takes_files:
            for path in self.paths[self.slice.k :: self.slice.n]:
                yield from self._read(path)
            return
        everything = (record for path in self.paths for record in self._read(path))
        for number, record in enumerate(everything):
            if number // STRIPE % self.slice.n == self.slice.k:
                yield record

    def _read(self, path: str) -> Iterator[Record]:
        if self._format == "parquet" or (self._format is None and path.endswith(".parquet")):
            from vdr_db.ingest.parquet import read_parquet

            return read_parquet(path, fields=self._fields, lenient=True)
        return read_records(
            path,
            format=self._format,  # type: ignore[arg-type]
            fields=self._fields,
            unique=self._unique,
            lenient=True,
        )

    def blocks(self, settled: Ranges, window: Window) -> Iterator[Block]:
        """Windows of the records that are not settled; see `Source`."""
        return cut_windows(self.records(), settled, window)


def cut_windows(records: Iterator[Record], settled: Ranges, window: Window) -> Iterator[Block]:
    """Blocks of unsettled records; the last one may hold no record but the count passed over."""
    watermark = settled.watermark
    resumed = sum(1 for _ in islice(records, watermark))
    numbers: list[int] = []
    chosen: list[Record] = []
    characters = 0
    failure = None
    try:
        for number, record in enumerate(records, start=watermark):
            if number in settled:
                resumed += 1
                continue
            numbers.append(number)
            chosen.append(record)
            characters += len(record.text)
            if len(chosen) >= window.documents or characters >= _LONGEST_WINDOW:
                yield Block(numbers, chosen, None, resumed)
                numbers, chosen, characters, resumed = [], [], 0, 0
    except InputError as error:
        failure = error
    if chosen or resumed:
        yield Block(numbers, chosen, None, resumed)
    if failure is not None:
        raise failure  # after what was read before the broken line


def _is_stream(path: str) -> bool:
    """Whether something can be read only once: standard input, a pipe, a device."""
    if path == "-":
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _expanded(path: str) -> list[str]:
    if _is_stream(path) or os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise InputError(f"{path}: no such file or folder.")
    if any(os.path.isfile(os.path.join(path, f"corpus.jsonl{end}")) for end in ("", *PACKED)):
        return [path]
    names = sorted(os.listdir(path))
    parts = [name for name in names if unpacked_name(name).endswith(_PARTS)]
    if not parts:
        raise InputError(
            f"{path} holds neither a BEIR corpus nor files ending in {', '.join(_PARTS)} (or "
            ".gz, .zst); a folder of images is an ImageFolderSource (--images)."
        )
    return [os.path.join(path, name) for name in parts]


def _data_file(path: str) -> str:
    """The file behind a path, which may be a BEIR folder."""
    if os.path.isdir(path):
        ends = (os.path.join(path, f"corpus.jsonl{end}") for end in ("", *PACKED))
        return next(end for end in ends if os.path.isfile(end))
    return path
