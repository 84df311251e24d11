"""Warnings that point at the line of whoever called the library, however deep they are given."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_caller"]


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the first line outside of this library."""
    level, frame = 2, sys._getframe(1).f_back
    while frame is not None and str(frame.f_globals.get("__name__")).split(".")[0] == "vdr_db":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level + 1)
