"""Numbers of things, whatever kind of integer they come as."""

from __future__ import annotations

import operator
from typing import Any

from vdr_db.errors import ConfigError

__all__ = ["counted"]


def counted(name: str, value: Any, *, least: int = 1) -> int:
    """The value as an `int`; integers of NumPy are as good as those of Python.

    Raises:
        ConfigError: It is no integer, or below `least`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ConfigError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
    return number
