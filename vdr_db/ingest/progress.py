"""How far an ingest is, for people and for machines: read, encoded and acknowledged apart.

Which of the three lags says which stage is slow, and that is what people need to know.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict
from typing import IO, Any, Literal, Protocol

from vdr_db.errors import ConfigError
from vdr_db.ingest.report import Totals

__all__ = ["JsonProgress", "LogProgress", "Progress", "ProgressKind", "choose_progress"]

ProgressKind = Literal["auto", "bar", "log", "json", "none"]

_LOGGER = logging.getLogger("vdr_db.ingest")


class Progress(Protocol):
    """Anything that wants to know how far an ingest is; called from the ingest's own thread."""

    def update(self, totals: Totals, *, is_last: bool = False) -> None:
        """Takes the totals so far, which keep changing, often: it must be quick."""


class _EverySoOften:
    """Tells the totals every so many seconds, and at the end."""

    def __init__(self, every_s: float, *, at_once: bool) -> None:
        self._every_s = every_s
        self._began = time.monotonic()
        self._last = self._began - every_s * at_once

    def update(self, totals: Totals, *, is_last: bool = False) -> None:
        """Tells them when it is time."""
        now = time.monotonic()
        if is_last or now - self._last >= self._every_s:
            self._last = now
            self._tell(totals, now - self._began, is_last)

    def _tell(self, totals: Totals, elapsed_s: float, is_last: bool) -> None:
        raise NotImplementedError


class LogProgress(_EverySoOften):
    """One line to the logger `vdr_db.ingest` every `every_s` seconds."""

    def __init__(self, every_s: float = 30.0) -> None:
        super().__init__(every_s, at_once=False)

    def _tell(self, totals: Totals, elapsed_s: float, is_last: bool) -> None:
        _LOGGER.info(
            "read %d, encoded %d, acknowledged %d, skipped %d, refused %d, retries %d, "
            "queue %.1f MiB, %.0f documents/s",
            totals.read,
            totals.encoded,
            totals.acknowledged,
            totals.resumed + totals.existing + totals.unchanged,
            totals.refused,
            totals.retries,
            totals.queued_bytes / 2**20,
            totals.acknowledged / max(elapsed_s, 1e-9),
        )


class JsonProgress(_EverySoOften):
    """One JSON object a line every `every_s` seconds: every total, and `elapsed_s`.

    Lines go to `stream`, standard error by default.
    """

    def __init__(self, stream: IO[str] | None = None, every_s: float = 1.0) -> None:
        super().__init__(every_s, at_once=True)
        self._stream = stream

    def _tell(self, totals: Totals, elapsed_s: float, is_last: bool) -> None:
        line = {**asdict(totals), "elapsed_s": round(elapsed_s, 3), "is_last": is_last}
        stream = self._stream or sys.stderr
        stream.write(json.dumps(line) + "\n")
        stream.flush()


class _BarProgress:
    """A tqdm bar on standard error; the bar counts what is acknowledged or skipped."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(unit=" docs", dynamic_ncols=True, desc="ingest", smoothing=0.1)

    def update(self, totals: Totals, *, is_last: bool = False) -> None:
        done = totals.acknowledged + totals.resumed + totals.existing + totals.unchanged
        self._bar.update(done - self._bar.n)
        self._bar.set_postfix_str(
            f"read {totals.read}, encoded {totals.encoded}, refused {totals.refused}, "
            f"retries {totals.retries}, queue {totals.queued_bytes / 2**20:.1f} MiB",
            refresh=False,
        )
        if is_last:
            self._bar.close()


class _NoProgress:
    def update(self, totals: Totals, *, is_last: bool = False) -> None:
        pass


def choose_progress(kind: ProgressKind = "auto") -> Progress:
    """The reporter for a kind: `auto` draws a bar on a terminal, and logs elsewhere.

    Raises:
        ConfigError: The kind is unknown.
    """
    if kind in ("auto", "bar"):
        if kind == "bar" or sys.stderr.isatty():
            try:
                return _BarProgress()
            except ModuleNotFoundError:
                _LOGGER.info("no progress bar: pip install 'vdr-db[cli]' brings tqdm")
        return LogProgress()
    if kind == "log":
        return LogProgress()
    if kind == "json":
        return JsonProgress()
    if kind == "none":
        return _NoProgress()
    raise ConfigError(f"`progress` must be auto, bar, log, json or none, got {kind!r}.")
