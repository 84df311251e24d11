"""What errors of `qdrant-client` mean, over REST and over gRPC alike."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from vdr_db.connectors.qdrant.engine import RefusedBatch
from vdr_db.errors import StoreError, StoreUnavailable

__all__ = ["NameTaken", "shown_url", "translated"]

_PASSING_CODES = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED"}
_PASSING_STATUS = {408, 429, 500, 502, 503, 504}
_PASSING_ERRORS = {"ResponseHandlingException", "ResourceExhaustedResponse"}
_REFUSING_STATUS = {400, 413, 422}
_TOO_LARGE = re.compile(r"larger than|too large|message size", re.IGNORECASE)
_TAKEN = re.compile(r"already exists", re.IGNORECASE)


class NameTaken(StoreError):
    """A collection of this name is there already."""


@contextlib.contextmanager
def translated(
    where: str, action: str, secret: str | None = None, *, refusable: bool = False
) -> Iterator[None]:
    """Turns errors of the client into those of this library; no message shows the secret.

    Args:
        where: The collection and its place.
        action: What was tried, as in "cannot be written".
        secret: A key to leave out of messages.
        refusable: Whether a refusal means that rows of a batch are unacceptable.

    Raises:
        RefusedBatch: `refusable`, and the server refuses the content.
        NameTaken: A collection of the name is there already.
        StoreUnavailable: The server cannot be reached or is in trouble.
        StoreError: Anything else.
    """
    try:
        yield
    except (StoreError, RefusedBatch):
        raise
    except Exception as error:
        status = getattr(error, "status_code", None)
        code = getattr(getattr(error, "code", lambda: None)(), "name", None)
        told = _told(error, secret)
        too_large = code == "RESOURCE_EXHAUSTED" and _TOO_LARGE.search(told)
        refused = status in _REFUSING_STATUS or code == "INVALID_ARGUMENT" or too_large
        if refusable and refused:
            raise RefusedBatch(told) from error
        if status in (401, 403) or code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise StoreError(
                f"{where} cannot {action}: the server refuses the credentials; check "
                "`api_key` and its rights."
            ) from error
        if status == 409 or code == "ALREADY_EXISTS" or _TAKEN.search(told):
            raise NameTaken(f"{where} cannot {action}: {told}.") from error
        passing = (
            status in _PASSING_STATUS
            or code in _PASSING_CODES
            or isinstance(error, (OSError, TimeoutError))
            or type(error).__name__ in _PASSING_ERRORS
        )
        kind = StoreUnavailable if passing else StoreError
        advice = "; check the address, or try again later" if passing else ""
        raise kind(f"{where} cannot {action}: {told}{advice}.") from error


def _told(error: Exception, secret: str | None) -> str:
    """What the error says, short and without the key."""
    details = getattr(error, "details", None)
    text = str(details()) if callable(details) else str(error)
    text = " ".join(text.split()) or type(error).__name__
    if secret:
        text = text.replace(secret, "***")
    return text if len(text) <= 300 else text[:300] + "…"


def shown_url(url: str) -> str:
    """The address without user, password and query, which may hold secrets."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    host = parts.hostname or ""
    port = "" if parts.port is None else f":{parts.port}"
    return f"{parts.scheme or 'http'}://{host}{port}{parts.path}"
