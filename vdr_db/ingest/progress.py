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
        """Takes the totals so far. Called often: it must be quick and decide itself what to show.

        Args:
            totals: The running totals; read them now, they keep changing.
            is_last: Whether this is the final call.
        """
        ...


class LogProgress:
    """One line to the logger `vdr_db.ingest` every so many seconds.

    Args:
        every_s: Seconds between lines.
    """

    def __init__(self, every_s: float = 30.0) -> None:
        self._every_s = every_s
        self._began = self._last = time.monotonic()

    def update(self, totals: Totals, *, is_last: bool = False) -> None:
        """Logs when it is time."""
        now = time.monotonic()
        if now - self._last < self._every_s and not is_last:
            return
        self._last = now
        rate = totals.acknowledged / max(now - self._began, 1e-9)
        _LOGGER.info("%s, %.0f documents/s", _line(totals), rate)


class JsonProgress:
    """One JSON object a line: every total, and `elapsed_s`.

    Args:
        stream: Where the lines go; standard error by default.
        every_s: Seconds between lines.
    """

    def __init__(self, stream: IO[str] | None = None, every_s: float = 1.0) -> None:
        self._stream = stream
        self._every_s = every_s
        self._began = time.monotonic()
        self._last = -every_s

    def update(self, totals: Totals, *, is_last: bool = False) -> None:
        """Writes a line when it is time."""
        elapsed = time.monotonic() - self._began
        if elapsed - self._last < self._every_s and not is_last:
            return
        self._last = elapsed
        line = {**asdict(totals), "elapsed_s": round(elapsed, 3), "is_last": is_last}
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


def _line(totals: Totals) -> str:
    return (
        f"read {totals.read}, encoded {totals.encoded}, acknowledged {totals.acknowledged}, "
        f"skipped {totals.resumed + totals.existing + totals.unchanged}, "
        f"refused {totals.refused}, retries {totals.retries}, "
        f"queue {totals.queued_bytes / 2**20:.1f} MiB"
    )
