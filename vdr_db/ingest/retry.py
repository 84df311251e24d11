"""What a failed write means, and how long to wait before the next try.

Every error of a store is one of six kinds; clients are told apart by the names and numbers they
carry, so no client is imported here.

| kind        | examples                                            | what the ingest does         |
|-------------|-----------------------------------------------------|------------------------------|
| `transient` | reset, 429, 500-503, gRPC UNAVAILABLE, ABORTED      | waits, sends the same again  |
| `timeout`   | no answer, 408, 504, gRPC DEADLINE_EXCEEDED         | the same, in smaller batches |
| `too_big`   | 413, "larger than", gRPC RESOURCE_EXHAUSTED on size | halves the batch             |
| `data`      | 400, 422, `RejectedRows`, gRPC INVALID_ARGUMENT     | isolates the row by halving  |
| `setup`     | 401, 403, 404, `StoreMismatch`, `ConfigError`       | stops at once                |
| `fatal`     | panic of an embedded engine, any unknown exception  | stops at once                |
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vdr_db.errors import (
    ConfigError,
    InputError,
    MissingExtraError,
    RejectedRows,
    ShapeError,
    StoreMismatch,
    StoreUnavailable,
)

__all__ = ["Failure", "FailureKind", "RetryPolicy", "classify", "redact"]

FailureKind = Literal["transient", "timeout", "too_big", "data", "setup", "fatal"]

_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 501, 502, 503, 504})
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
    r"larger than|too large|payload .*limit|exceeds? .*(size|limit)|message length|entity too",
    re.IGNORECASE,
)
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


@dataclass(frozen=True)
class Failure:
    """What one failed call means.

    Attributes:
        kind: What to do about it; see the module's table.
        reason: One line for people, without secrets.
        retry_after_s: Seconds the server asked to wait, if it did.
        rejected: Caller's id → reason, when the store named the rows it refused.
    """

    kind: FailureKind
    reason: str
    retry_after_s: float | None = None
    rejected: Mapping[int | str, str] | None = None


@dataclass(frozen=True)
class RetryPolicy:
    """Full-jitter exponential backoff with a bound on tries and on time.

    Attributes:
        tries: Most calls for one batch, the first included.
        base_s: Upper bound of the first wait, in seconds; each further bound is twice as large.
        cap_s: Largest such bound, in seconds.
        deadline_s: Longest time for one batch over all tries, in seconds.
    """

    tries: int = 8
    base_s: float = 0.5
    cap_s: float = 30.0
    deadline_s: float = 300.0

    def __post_init__(self) -> None:
        """Refuses what would never try or never stop."""
        if self.tries < 1 or not (0 < self.base_s <= self.cap_s) or not self.deadline_s > 0:
            raise ConfigError(
                "a retry policy needs tries ≥ 1, 0 < base_s ≤ cap_s and deadline_s > 0, "
                f"got {self}; see `RetryPolicy`."
            )

    def delay_s(self, failures: int, retry_after_s: float | None, chance: random.Random) -> float:
        """Seconds to wait after the n-th failure of a batch (n from 1).

        A wait the server asked for is never cut short; a little jitter on top keeps writers that
        were refused together from coming back together.
        """
        bound = min(self.cap_s, self.base_s * 2.0 ** min(failures - 1, 60))
        jitter = chance.uniform(0.0, bound)
        if retry_after_s is None:
            return jitter
        return retry_after_s + min(jitter, 0.1 * retry_after_s + 0.05)


def redact(text: str) -> str:
    """The text without credentials: user parts of addresses, keys, tokens and passwords."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def classify(error: BaseException) -> Failure:
    """What an exception raised by a store means for the batch that was being written."""
    reason = _reason(error)
    if isinstance(error, RejectedRows):
        rejected = {id: redact(why) for id, why in zip(error.ids, error.reasons, strict=True)}
        return Failure("data", reason, rejected=rejected)
    if isinstance(error, (StoreMismatch, ConfigError, MissingExtraError)):
        return Failure("setup", reason)
    if isinstance(error, (InputError, ShapeError)):
        return Failure("data", reason)
    retry_after_s = _retry_after_s(error)
    for link in _chain(error):
        if not isinstance(link, Exception):
            return Failure("fatal", reason)  # PanicException of an engine derives BaseException
        kind = _kind_of(link)
        if kind is not None:
            return Failure(kind, reason, retry_after_s)
    if isinstance(error, StoreUnavailable):
        return Failure("transient", reason, retry_after_s)
    return Failure("fatal", reason)


def _kind_of(error: BaseException) -> FailureKind | None:
    status = _status(error)
    if isinstance(status, int):
        if status == 413 or (status in _DATA_STATUS and _SIZE_WORDS.search(str(error))):
            return "too_big"
        if status in _TRANSIENT_STATUS:
            return "timeout" if status in (408, 504) else "transient"
        if status in _DATA_STATUS:
            return "data"
        return "setup" if 400 <= status < 500 else None
    if isinstance(status, str):
        if status == "RESOURCE_EXHAUSTED" and _SIZE_WORDS.search(str(error)):
            return "too_big"
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
        holders = (link, getattr(link, "response", None), getattr(link, "meta", None))
        for holder in holders:
            headers: Any = getattr(holder, "headers", None)
            if not hasattr(headers, "get"):
                continue
            value = headers.get("retry-after", headers.get("Retry-After"))
            if value is not None:
                try:
                    return max(0.0, float(value))
                except (TypeError, ValueError):
                    continue  # the date form: our own backoff is as good
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _reason(error: Any) -> str:
    details = getattr(error, "details", None)  # gRPC's own text; str() of it spans many lines
    if callable(details):
        try:
            details = details()
        except Exception:
            details = None
    text = details if isinstance(details, str) and details else str(error)
    code = _status(error)
    shown = f"{type(error).__name__}{f' {code}' if code is not None else ''}: {text}"
    shown = redact(" ".join(shown.split()))
    return shown if len(shown) <= _LONGEST_REASON else shown[: _LONGEST_REASON - 1] + "…"
