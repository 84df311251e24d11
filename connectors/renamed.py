"""Old names of methods."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["renamed"]

_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")


def renamed(old: str, method: Callable[_Arguments, _Answer]) -> Callable[_Arguments, _Answer]:
    """A method under its old name, which warns."""
    new = method.__name__

    @functools.wraps(method)
    def alias(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Answer:
        warnings.warn(
            f"`{old}` is called `{new}` now; use that name.", DeprecationWarning, stacklevel=2
        )
        return method(*arguments, **options)

    alias.__name__, alias.__doc__ = old, f"The old name of `{new}`."
    return alias
