"""A lock that says which process has a folder open."""

from __future__ import annotations

import contextlib
import os
import weakref
from pathlib import Path
from types import ModuleType

from vdr_db.errors import StoreUnavailable

__all__ = ["FolderLock"]

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:
    # Elsewhere than on POSIX the engine's own lock has to do.
    fcntl = None


class FolderLock:
    """An exclusive lock on a file, which stays behind, held until `release` or the process's death.

    Raises:
        StoreUnavailable: Another opener of `where` holds it, or the file cannot be written.
    """

    def __init__(self, path: Path, where: str) -> None:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise StoreUnavailable(
                f"{where} cannot be opened for writing ({error}), which searching needs too; check "
                "the rights on the folder, or search a copy of it."
            ) from error
        self._close = weakref.finalize(self, os.close, descriptor)
        if fcntl is None:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 64, 0).decode("ascii", "replace").strip()
            self.release()
            raise StoreUnavailable(
                f"{where} is already open in process {holder or 'unknown'}; one process at a time "
                "opens a folder: close it there, or run a Qdrant server for several."
            ) from error
        except OSError:
            return  # a file system without locks; the engine's own lock has to do
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Lets go; a second call does nothing."""
        self._close()
