"""What a failed call of a store means, for whatever client it went through.

Every error of a store is one of six kinds. Stores attach theirs to what they raise
(`StoreError.failure`); errors of other stores are told apart by the names and numbers they carry,
so no client is imported here.

| kind        | examples                                            | what is done                 |
|-------------|-----------------------------------------------------|------------------------------|
| `transient` | reset, 429, 500-503, gRPC UNAVAILABLE, ABORTED      | waits, sends the same again  |
| `timeout`   | no answer, 408, 504, gRPC DEADLINE_EXCEEDED         | the same, in smaller batches |
| `too_big`   | 413, "larger than", gRPC RESOURCE_EXHAUSTED on size | halves the batch             |
| `data`      | 400, 422, `RejectedRows`, gRPC INVALID_ARGUMENT     | isolates the row by halving  |
| `setup`     | 401, 403, 404, `StoreMismatch`, `ConfigError`       | stops at once                |
| `fatal`     | panic of an embedded engine, any unknown exception  | stops at once                |

A server that limits rates may take in parts what it refuses as a whole; then `wants_split` is set
beside `transient`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vdr_db.errors import (
    ConfigError,
    InputError,
    MissingExtraError,
    RejectedRows,
    ShapeError,
    StoreError,
    StoreMismatch,
    StoreUnavailable,
)
from vdr_db.failure import Failure, FailureKind

__all__ = [
    "BUSY",
    "classify",
    "failure_of_status",
    "is_passing",
    "one_line",
    "redact",
    "told",
    "wait_asked_for",
]

BUSY = frozenset({408, 425, 429, 500, 501, 502, 503, 504})
"""HTTP statuses that pass: the same request may succeed a little later."""

_DATA_STATUS = frozenset({400, 409, 422})
_GRPC_KINDS: Mapping[str, FailureKind] = {
    "UNAVAILABLE": "transient",
    "ABORTED": "transient",
    "CANCELLED": "transient",
    "INTERNAL": "transient",
    "UNKNOWN": "transient",
    "RESOURCE_EXHAUSTED": "transient",
    "DEADLINE_EXCEEDED": "timeout",
    "INVALID_ARGUMENT": "data",
    "OUT_OF_RANGE": "data",
}
# Names in the class hierarchies of httpx, elastic-transport, urllib3 and requests.
_TIMEOUT_NAMES = frozenset({"TimeoutException", "ConnectionTimeout", "ReadTimeoutError", "Timeout"})
_TRANSPORT_NAMES = frozenset(
    {
        "TransportError",
        "NetworkError",
        "RemoteProtocolError",
        "ResponseHandlingException",
        "HTTPError",
    }
)
_SIZE_WORDS = re.compile(
    r"larger than|too large|payload .*limit|exceeds? .*(size|limit)|message (length|size)"
    r"|entity too",
    re.IGNORECASE,
)
# Qdrant's strict mode, over REST and over gRPC, and a search server short of memory.
_SPLIT_WORDS = re.compile(
    r"split your request|requires [\d.]+ tokens|circuit_breaking_exception", re.IGNORECASE
)
# A cluster with a shard or a node down, whatever status that comes with.
_PASSING_WORDS = re.compile(
    r"shards failed to apply|read operations failed|currently unavailable|timeout error",
    re.IGNORECASE,
)
_RETRY_AFTER = re.compile(r"retry after ([\d.]+) ?s", re.IGNORECASE)
_LONGEST_REASON = 300
_SECRETS = (
    (re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://)[^/\s@]+@"), r"\1***@"),
    (
        re.compile(
            r"(?i)(api[-_ ]?key|authorization|bearer|token|password|secret)"
            r"(['\"]?\s*[:= ]\s*(?:b?['\"])?(?:bearer |basic |apikey )?)([^\s'\",;)&]{4,})"
        ),
        r"\1\2***",
    ),
)


def classify(error: BaseException) -> Failure:
    """What an exception raised by a store means for the call that was made."""
    reason = _reason(error)
    if isinstance(error, RejectedRows):
        rejected = {id: redact(why) for id, why in zip(error.ids, error.reasons, strict=True)}
        return Failure("data", reason, rejected=rejected)
    if isinstance(error, StoreError) and error.failure is not None:
        return replace(error.failure, reason=reason)
    if isinstance(error, (StoreMismatch, ConfigError, MissingExtraError)):
        return Failure("setup", reason)
    if isinstance(error, (InputError, ShapeError)):
        return Failure("data", reason)
    for link in _chain(error):
        if not isinstance(link, Exception):
            return Failure("fatal", reason)  # PanicException of an engine derives BaseException
        kind = _kind_of(link)
        if kind is not None:
            return _failure(kind, reason, _retry_after_s(error), str(link))
    if isinstance(error, StoreUnavailable):
        return Failure("transient", reason, _retry_after_s(error))
    return Failure("fatal", reason)


def failure_of_status(
    status: int, reason: str, retry_after_s: float | None = None
) -> Failure | None:
    """What an HTTP status with this reason means; `None` for one that tells nothing."""
    kind = _kind_of_status(status, reason)
    return None if kind is None else _failure(kind, reason, retry_after_s, reason)


def wait_asked_for(headers: Any) -> float | None:
    """Seconds of a Retry-After header; `None` without one, and for the form of a date."""
    if not hasattr(headers, "get"):
        return None
    value = headers.get("retry-after", headers.get("Retry-After"))
    try:
        return None if value is None else max(0.0, float(value))
    except (TypeError, ValueError):
        return None  # a date: our own waits are as good


def redact(text: str, secrets: Sequence[str] = ()) -> str:
    """The text without credentials: user parts of addresses, keys, tokens and passwords.

    Args:
        text: What may be shown to anyone afterwards.
        secrets: Texts that are known to be secret, wherever they stand.
    """
    for secret in secrets:
        text = text.replace(secret, "***") if secret else text
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def one_line(value: object, most: int = _LONGEST_REASON) -> str:
    """Text in one line of at most that many characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def told(error: BaseException, secrets: Sequence[str] = ()) -> str:
    """What an error says, in one short line without secrets."""
    details: Any = getattr(error, "details", None)  # gRPC's own text; str() of it is many lines
    if callable(details):
        try:
            details = details()
        except Exception:
            details = None
    text = details if isinstance(details, str) and details else _said(error) or str(error)
    return one_line(redact(" ".join(text.split()), secrets) or type(error).__name__)


def is_passing(text: str) -> bool:
    """Whether a sentence tells of a part of a cluster that is down, which comes back."""
    return _PASSING_WORDS.search(text) is not None


def _said(error: BaseException) -> str | None:
    """The sentence in the JSON of a Qdrant's refusal over REST, which str() shows as bytes."""
    content = getattr(error, "content", None)
    if not isinstance(content, bytes):
        return None
    try:
        sentence = json.loads(content)["status"]["error"]
    except (ValueError, TypeError, LookupError):
        return None
    return str(sentence)


def _failure(kind: FailureKind, reason: str, retry_after_s: float | None, text: str) -> Failure:
    wants_split = kind == "too_big" or (
        kind in ("transient", "timeout") and _SPLIT_WORDS.search(text) is not None
    )
    return Failure(kind, reason, retry_after_s, wants_split)


def _kind_of_status(status: int, text: str) -> FailureKind | None:
    if status == 413 or (status in _DATA_STATUS and _SIZE_WORDS.search(text)):
        return "too_big"
    if status in BUSY:
        return "timeout" if status in (408, 504) else "transient"
    if status in _DATA_STATUS:
        return "data"
    return "setup" if 400 <= status < 500 else None


def _kind_of(error: BaseException) -> FailureKind | None:
    status = _status(error)
    if status is not None and is_passing(f"{told(error)} {error}"):
        return "transient"
    if isinstance(status, int):
        return _kind_of_status(status, str(error))
    if isinstance(status, str):
        if status == "RESOURCE_EXHAUSTED" and _SIZE_WORDS.search(str(error)):
            # A limit of rates is one that a smaller request meets too.
            return "transient" if _SPLIT_WORDS.search(str(error)) else "too_big"
        return _GRPC_KINDS.get(status, "setup")
    names = {kind.__name__ for kind in type(error).__mro__}
    if "ResourceExhaustedResponse" in names:  # qdrant-client's name for 429
        return "transient"
    if isinstance(error, TimeoutError) or names & _TIMEOUT_NAMES:
        return "timeout"
    inner = getattr(error, "source", None)  # qdrant-client wraps what httpx raised
    if isinstance(inner, Exception) and inner is not error:
        kind = _kind_of(inner)
        if kind is not None:
            return kind
    if isinstance(error, ConnectionError) or names & _TRANSPORT_NAMES:
        return "transient"
    return None


def _status(error: BaseException) -> int | str | None:
    """HTTP status as a number, gRPC status as its name, or None."""
    for holder in (error, getattr(error, "response", None), getattr(error, "meta", None)):
        for name in ("status_code", "status"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    code = getattr(error, "code", None)
    if callable(code):
        try:
            code = code()
        except Exception:
            return None
    code_name = getattr(code, "name", None)
    return code_name if isinstance(code_name, str) and code_name.isupper() else None


def _retry_after_s(error: BaseException) -> float | None:
    for link in _chain(error):
        direct = getattr(link, "retry_after_s", getattr(link, "retry_after", None))
        if isinstance(direct, (int, float)) and direct >= 0:
            return float(direct)
        for holder in (link, getattr(link, "response", None), getattr(link, "meta", None)):
            waiting = wait_asked_for(getattr(holder, "headers", None))
            if waiting is not None:
                return waiting
        if said := _RETRY_AFTER.search(told(link)):
            return float(said[1])
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _reason(error: BaseException) -> str:
    code = _status(error)
    name = "" if isinstance(error, StoreError) else f"{type(error).__name__}"
    return one_line(": ".join(filter(None, (f"{name} {code or ''}".strip(), told(error)))))
