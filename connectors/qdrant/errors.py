"""What errors of `qdrant-client` mean, over REST and over gRPC alike."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from vdr_db.connectors.failures import classify, told
from vdr_db.connectors.halving import RefusedBatch
from vdr_db.errors import StoreError, StoreUnavailable
from vdr_db.failure import Failure

__all__ = ["LimitExceeded", "NameTaken", "shown_url", "translated"]

# What is wrong with the collection or the call for it, and not with any row.
_OF_COLLECTION = re.compile(
    r"shard key|not existing vector name|vector dimension error|is not configured in this"
    r"|collection .* doesn't exist",
    re.IGNORECASE,
)
_LIMIT = re.compile(r"limit exceeded (\d+) > (\d+) for \"?([^\"]*)", re.IGNORECASE)
_TAKEN = re.compile(r"already exists", re.IGNORECASE)


class NameTaken(StoreError):
    """A collection of this name is there already."""


class LimitExceeded(StoreError):
    """The server's strict mode takes at most `limit` at once."""

    limit = 0


@contextlib.contextmanager
def translated(
    where: str, action: str, secret: str | None = None, *, refusable: bool = False
) -> Iterator[None]:
    """Turns errors of the client into those of this library; no message shows the secret.

    Args:
        where: The collection and its place.
        action: What was tried, as in "cannot be written".
        secret: A key to leave out of messages.
        refusable: Whether a refusal means that rows of a batch are unacceptable, a `RefusedBatch`.
    """
    try:
        yield
    except (StoreError, RefusedBatch):
        raise
    except Exception as error:
        failure = classify(error)
        said = told(error, [secret or ""])
        status = getattr(error, "status_code", None)
        code = getattr(getattr(error, "code", lambda: None)(), "name", None)
        over = _LIMIT.search(said)
        if over is not None and not refusable:
            exceeded = LimitExceeded(f"{where} cannot {action}: {said}.", failure=failure)
            exceeded.limit = int(over[2])
            raise exceeded from error
        if over is None and _OF_COLLECTION.search(said):
            raise StoreError(
                f"{where} cannot {action}: {said}; check how the collection was made, or name its "
                "shard key in `read_options` and `write_options`.",
                failure=Failure("setup", failure.reason),
            ) from error
        if refusable and (
            over or failure.kind == "too_big" or (failure.kind == "data" and status != 409)
        ):
            raise RefusedBatch(said) from error
        if status in (401, 403) or code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise StoreError(
                f"{where} cannot {action}: the server refuses the credentials; check "
                "`api_key` and its rights.",
                failure=failure,
            ) from error
        if status == 409 or code == "ALREADY_EXISTS" or _TAKEN.search(said):
            raise NameTaken(f"{where} cannot {action}: {said}.", failure=failure) from error
        if failure.kind in ("transient", "timeout") or isinstance(error, OSError):
            raise StoreUnavailable(
                f"{where} cannot {action}: {said}; check the address, or try again later.",
                failure=failure if failure.kind != "fatal" else None,
            ) from error
        raise StoreError(f"{where} cannot {action}: {said}.", failure=failure) from error


def shown_url(url: str) -> str:
    """The address without user, password and query, which may hold secrets."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port is None else f":{parts.port}"
    return f"{parts.scheme or 'http'}://{host}{port}{parts.path}"
