"""Exit codes of `vdr-db`, each with one meaning for all commands."""

from __future__ import annotations

__all__ = [
    "DONE",
    "EXTRA_MISSING",
    "FAULT_OF_OURS",
    "INTERRUPTED",
    "NOTHING_FOUND",
    "OUTPUT_CLOSED",
    "STORE_FAILED",
    "WRONG_INPUT",
]

DONE, NOTHING_FOUND, WRONG_INPUT, STORE_FAILED, EXTRA_MISSING = range(5)
FAULT_OF_OURS, INTERRUPTED, OUTPUT_CLOSED = 70, 130, 141
