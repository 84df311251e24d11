"""The border for bytes that others wrote: whatever goes wrong on them is an error of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vdr_db.errors import VdrError

__all__ = ["foreign"]


@contextmanager
def foreign(what: str, kind: type[VdrError], fix: str = "fetch it again") -> Iterator[None]:
    """Reads something that anybody may have written.

    Args:
        what: The file or folder, for the message.
        kind: Of the error.
        fix: What to do.

    Raises:
        VdrError: Of that kind, instead of whatever another library, or Python, raises. Errors of
            ours pass, and so do those of packages that are not installed, and interrupts.
    """
    try:
        yield
    except (VdrError, ImportError):
        raise
    except BaseException as error:
        # A Rust panic derives from BaseException, so `except Exception` would miss it.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        told = " ".join(str(error).split())[:300]
        raise kind(
            f"{what} holds something that cannot be read ({type(error).__name__}: {told}); {fix}."
        ) from error
