"""Work of a process that another one may have to end, when the first was killed."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ALIVE_S", "WORK_KEY", "Work"]

WORK_KEY = "vdr_db_work"
"""Where it is noted, beside what a collection or an index is."""

ALIVE_S = 900.0
"""A process that works on an index tells so more often than this."""


@dataclass(frozen=True)
class Work:
    """Work of a process that an index or a collection must not stay in when it is killed.

    Attributes:
        host: Where the process runs.
        process: Its id.
        since: When it last told that it is alive, in seconds of the epoch.
        undo: Settings that put an index right again.
    """

    host: str
    process: int
    since: float
    undo: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_this_process(cls, undo: Mapping[str, Any] | None = None) -> Work:
        """Work that begins now."""
        return cls(socket.gethostname(), os.getpid(), time.time(), undo or {})

    @property
    def is_due(self) -> bool:
        """Whether it is time to tell again that the process is alive."""
        return time.time() - self.since > ALIVE_S / 3

    @property
    def is_abandoned(self) -> bool:
        """Whether its process ended without putting the index right, as far as one can tell."""
        return time.time() - self.since > ALIVE_S or self.is_over

    @property
    def is_here(self) -> bool:
        """Whether its process runs, or ran, on this machine."""
        return self.host == socket.gethostname()

    @property
    def is_over(self) -> bool:
        """Whether its process ran on this machine and is gone."""
        if not self.is_here:
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # of another user
        return False
