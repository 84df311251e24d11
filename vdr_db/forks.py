"""What a fork does to objects whose threads, locks and files stay with the parent.

A child gets a copy of the memory and one thread. Native objects with threads of their own wait for
them for ever there, even where they are only destroyed, and a lock that another thread held is
held for good. So such objects say what becomes of them: `renew_after_fork`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from pathlib import Path
from typing import Protocol

__all__ = ["Renewed", "close_files_below", "end_children_at_once", "leak", "renew_after_fork"]


class Renewed(Protocol):
    """Something that is told of a fork."""

    def after_fork(self) -> None:
        """Called in the child before anything else runs there; must not wait."""


_renewed: weakref.WeakSet[Renewed] = weakref.WeakSet()
_children_end_at_once = False


def renew_after_fork(one: Renewed) -> None:
    """Calls `one.after_fork()` in every child of this process, as long as `one` lives."""
    _renewed.add(one)


def leak(native: object) -> None:
    """Keeps an object from ever being destroyed in this process, not even at its end."""
    if native is not None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))


def close_files_below(folder: Path) -> None:
    """Closes files of a folder that the parent opened, as their locks are held by both.

    Only for a child that has leaked whatever would use them. Does nothing where the system does not
    list open files.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if Path(os.readlink(f"/proc/self/fd/{name}")).is_relative_to(folder):
                    os.close(int(name))


def end_children_at_once() -> None:
    """Children of this process end without the exit handlers of native libraries.

    Those of a library whose threads stayed with the parent may wait for them: ONNX Runtime's do.
    Python's own handlers run, and its files are flushed.
    """
    global _children_end_at_once
    _children_end_at_once = True


def _renew_all() -> None:
    global _children_end_at_once
    if _children_end_at_once:
        _children_end_at_once = False  # handlers are inherited
        with contextlib.suppress(AttributeError):  # not every C library has it
            library = ctypes.CDLL(None)
            library.on_exit(library._exit, None)
    for one in list(_renewed):
        one.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
