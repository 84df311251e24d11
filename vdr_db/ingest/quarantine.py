"""Refused documents, one JSON line each: number, id, reason and where they were read.

Lines are appended before the ledger says the record is settled. A kill between the two repeats the
refusal, so a line whose number the file already holds is not written again: each refused record has
exactly one line, however often the ingest was killed. Texts and payloads are not copied; the source
location leads back to them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from vdr_db.errors import ConfigError, InputError, StoreUnavailable

__all__ = ["Quarantine", "Refusal", "check_refusals"]


@dataclass(frozen=True)
class Refusal:
    """A document that was not stored, and why: one sentence without secrets.

    `number` is its position in reading order, from 0; `source` is `"FILE:LINE"`, when known.
    """

    number: int
    id: int | str
    reason: str
    source: str = ""


def check_refusals(
    refused: int, allowed: int | None, read: int, last: Refusal | None = None
) -> None:
    """Stops an ingest that refuses more than `allowed` documents, by an `InputError`.

    `None` stands for 100 or 1 % of the documents read, whichever is more.
    """
    most = max(100, read // 100) if allowed is None else allowed
    if refused > most and last is not None:
        raise InputError(
            f"{refused} documents were refused, more than the {most} allowed; the last is "
            f"{last.id!r}{f' ({last.source})' if last.source else ''}: {last.reason}; mend the "
            "input, or allow more with `max_errors`."
        )


class Quarantine:
    """Append-only file of refusals, safe against kills and repeats.

    Args:
        path: The file; made with the first refusal.
        restart: Begin an empty file instead of adding to what is there.

    Attributes:
        ids: Ids of the refusals in the file.

    Raises:
        ConfigError: The file holds something else than refusals.
        StoreUnavailable: The file cannot be read or written.
    """

    def __init__(self, path: str | Path, *, restart: bool = False) -> None:
        self.path = Path(path)
        self._known: set[int] = set()
        self.ids: set[int | str] = set()
        try:
            if self.path.exists():
                self._load()  # also before a restart: a foreign file is not ours to delete
                if restart:
                    self.path.unlink()
                    self._known.clear()
                    self.ids.clear()
        except OSError as error:
            raise self._unwritable(error) from error

    def _load(self) -> None:
        """Learns the numbers in the file and cuts off a line that a kill left half written."""
        with open(self.path, "r+b") as stream:
            whole = 0
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                try:
                    refusal = json.loads(line)
                    self._known.add(int(refusal["number"]))
                    self.ids.add(refusal["id"])
                except (ValueError, KeyError, TypeError) as error:
                    raise ConfigError(
                        f"{self.path} is not a quarantine file: expected lines written by an "
                        f"ingest, got {line[:60]!r}; name another file."
                    ) from error
                whole += len(line)
            stream.truncate(whole)

    def __len__(self) -> int:
        """Refusals in the file."""
        return len(self._known)

    def append(self, refusals: Iterable[Refusal]) -> None:
        """Adds refusals that the file does not hold yet; on disk when this returns.

        Raises `StoreUnavailable` if it cannot be written; none of these lines counts as written
        then.
        """
        new = [refusal for refusal in refusals if refusal.number not in self._known]
        if not new:
            return
        lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in new).encode(
            "utf-8", "backslashreplace"
        )
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(handle).st_size
                try:
                    written = 0
                    while written < len(lines):
                        written += os.write(handle, lines[written:])
                    os.fsync(handle)
                except OSError:
                    with suppress(OSError):  # a device or a dead disk: nothing to take back
                        os.ftruncate(handle, size)
                    raise
            finally:
                os.close(handle)
        except OSError as error:
            raise self._unwritable(error) from error
        self._known.update(one.number for one in new)
        self.ids.update(one.id for one in new)

    def _unwritable(self, error: OSError) -> StoreUnavailable:
        return StoreUnavailable(
            f"the quarantine file {self.path} cannot be written ({error.strerror}); free space or "
            "mend permissions and run the same command again."
        )
