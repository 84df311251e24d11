"""The one door to a search server: requests, retries, and its errors in our words.

Works over an `elasticsearch` client (8.11 to 9.x) and, because the requests are the same, over an
`opensearch-py` client. The client's own retries are switched off: they know neither Retry-After nor
a deadline for the whole.
"""

from __future__ import annotations

import base64
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vdr_db.errors import ConfigError, StoreError, StoreUnavailable, require

__all__ = [
    "BUSY",
    "Backoff",
    "Overloaded",
    "Reply",
    "RetryPolicy",
    "Wire",
    "connect",
    "error_reason",
    "refusal",
]

BUSY = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses that pass: the same request may succeed a little later."""


@dataclass(frozen=True)
class RetryPolicy:
    """When to try again what failed for a passing reason.

    The n-th wait is drawn from [0, min(cap_s, base_s * 2^n)] ("full jitter", so that many writers
    do not come back together), and is at least what the server asks for by Retry-After.

    Attributes:
        tries: Attempts without any progress before giving up.
        base_s: Scale of the first wait, in seconds.
        cap_s: Longest drawn wait, in seconds.
        deadline_s: Total time for one request, waits included, in seconds.
    """

    tries: int = 8
    base_s: float = 0.5
    cap_s: float = 30.0
    deadline_s: float = 300.0

    def __post_init__(self) -> None:
        if self.tries < 1 or min(self.base_s, self.cap_s, self.deadline_s) < 0:
            raise ConfigError(
                f"a retry policy needs `tries` >= 1 and times >= 0 seconds, got {self}."
            )


class Overloaded(StoreUnavailable):
    """A passing failure: no connection, no answer, or a server that asks to come back later.

    Attributes:
        retry_after_s: Seconds the server asks to wait, or `None`.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


@dataclass(frozen=True)
class Reply:
    """An answer: HTTP status and parsed JSON body."""

    status: int
    body: Any


class Backoff:
    """Waits between attempts of one request, until tries or time run out."""

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Starts the clock."""
        self.policy = policy
        self._sleep = sleep
        self._clock = clock
        self._draw = draw
        self._attempt = 0
        self._end = clock() + policy.deadline_s

    def progress(self) -> None:
        """Starts counting tries anew, because something got through; the deadline stays."""
        self._attempt = 0

    def wait(self, error: Overloaded) -> None:
        """Sleeps before the next attempt.

        Raises:
            StoreUnavailable: No tries or not enough time is left; says what failed last.
        """
        pause = self._draw() * min(self.policy.cap_s, self.policy.base_s * 2.0**self._attempt)
        self._attempt += 1
        pause = max(pause, error.retry_after_s or 0.0)
        if self._attempt >= self.policy.tries:
            spent = f"{self._attempt} attempts"
        elif self._clock() + pause > self._end:
            spent = f"{self.policy.deadline_s:g} s"
        else:
            self._sleep(pause)
            return
        raise StoreUnavailable(
            f"the search server could not be used for {spent} ({error}); what was acknowledged is "
            "safe, so run the same call again once the server answers."
        ) from error


class Wire:
    """Sends requests through a client object.

    Attributes:
        policy: When to try again.
        retries: Attempts repeated so far, for progress reports.
    """

    def __init__(
        self,
        client: Any,
        *,
        policy: RetryPolicy | None = None,
        secrets: Sequence[str] = (),
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Takes a client; `secrets` are texts that must never appear in an error."""
        self.policy = policy or RetryPolicy()
        self.retries = 0
        self._secrets = tuple(secret for secret in secrets if secret)
        self._start_backoff = partial(Backoff, self.policy, sleep=sleep, clock=clock, draw=draw)
        self._version: tuple[int, int] | None = None
        self._is_opensearch = type(client).__module__.split(".")[0] == "opensearchpy"
        if self._is_opensearch:
            self._client = client
        elif hasattr(client, "options") and hasattr(client, "perform_request"):
            self._client = client.options(max_retries=0, retry_on_timeout=False)
        else:
            raise ConfigError(
                "`client` must be an elasticsearch.Elasticsearch (8.11 or newer) or "
                f"opensearchpy.OpenSearch object, got {type(client).__module__}."
                f"{type(client).__name__}; asynchronous clients are not supported."
            )

    def __repr__(self) -> str:
        """Names the kind of client and nothing that could be secret."""
        return f"Wire({'opensearch-py' if self._is_opensearch else 'elasticsearch'})"

    def backoff(self) -> Backoff:
        """A fresh allowance of tries and time."""
        return self._start_backoff()

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        allow: Sequence[int] = (),
        backoff: Backoff | None = None,
    ) -> Reply:
        """Sends a request until it is answered. Send only what may be carried out twice.

        Args:
            method: HTTP method.
            path: Path with a leading slash, names in it already quoted.
            body: JSON, or bytes of newline-delimited JSON.
            params: Query parameters.
            allow: Statuses at and above 400 that are returned rather than raised.
            backoff: An allowance shared with other requests; a fresh one without.

        Raises:
            StoreUnavailable: No answer within tries and deadline.
            StoreError: The server refused the request.
            ConfigError: Client and server do not fit each other.
        """
        backoff = backoff or self.backoff()
        while True:
            try:
                return self.once(method, path, body, params=params, allow=allow)
            except Overloaded as error:
                backoff.wait(error)
                self.retries += 1

    def once(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        allow: Sequence[int] = (),
    ) -> Reply:
        """Sends a request once; a passing failure is raised as `Overloaded`."""
        headers = {"accept": "application/json"}
        if body is not None:
            kind = "x-ndjson" if isinstance(body, bytes) else "json"
            headers["content-type"] = f"application/{kind}"
        send = self._send_opensearch if self._is_opensearch else self._send_elasticsearch
        status, answer, retry_after = send(method, path, headers, dict(params or {}), body)
        if status in (400, 406):
            _check_majors(status, answer)
        if status < 400 or status in allow:
            return Reply(status, answer)
        reason = self._scrub(f"{method} {path}: {status} {error_reason(answer)}")
        if status in BUSY:
            raise Overloaded(reason, retry_after)
        raise refusal(status, reason)

    def version(self) -> tuple[int, int]:
        """Major and minor version of the server."""
        if self._version is None:
            number = self.call("GET", "/").body["version"]["number"]
            major, minor = str(number).split(".")[:2]
            self._version = int(major), int(minor)
        return self._version

    @property
    def is_opensearch(self) -> bool:
        """Whether the client is one of OpenSearch."""
        return self._is_opensearch

    def close(self) -> None:
        """Closes the client's connections."""
        self._client.close()

    def _send_elasticsearch(
        self, method: str, path: str, headers: dict[str, str], params: dict[str, Any], body: Any
    ) -> tuple[int, Any, float | None]:
        elasticsearch = require("elasticsearch", "elasticsearch")
        transport = require("elastic_transport", "elasticsearch")
        try:
            reply = self._client.perform_request(
                method, path, params=params, headers=headers, body=body
            )
        except elasticsearch.UnsupportedProductError as error:
            raise ConfigError(
                "the server does not present itself as Elasticsearch; for OpenSearch pass "
                "client=opensearchpy.OpenSearch(...)."
            ) from error
        except elasticsearch.ApiError as error:
            return error.status_code, error.body, _retry_after(error.meta.headers)
        except transport.TlsError as error:
            raise StoreError(
                f"no secure connection ({self._scrub(str(error))}); check `ca_certs` or "
                "`ssl_assert_fingerprint`."
            ) from error
        except (transport.TransportError, transport.SerializationError) as error:
            # Not chained: what a client puts in its errors is not ours to vouch for.
            raise Overloaded(f"{method} {path}: {self._scrub(_first_line(error))}") from None
        return reply.meta.status, reply.body, None

    def _send_opensearch(
        self, method: str, path: str, headers: dict[str, str], params: dict[str, Any], body: Any
    ) -> tuple[int, Any, float | None]:
        opensearchpy = require("opensearchpy", "opensearch")
        try:
            answer = self._client.transport.perform_request(
                method, path, headers=headers, params=params, body=body
            )
        except opensearchpy.SSLError as error:
            raise StoreError(
                f"no secure connection ({self._scrub(str(error))}); check the client's TLS options."
            ) from error
        except (opensearchpy.ConnectionError, opensearchpy.SerializationError) as error:
            raise Overloaded(f"{method} {path}: {self._scrub(_first_line(error))}") from None
        except opensearchpy.TransportError as error:
            return int(error.status_code), error.info, None
        return 200, answer, None

    def _scrub(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def connect(
    *,
    url: str | Sequence[str] | None,
    cloud_id: str | None,
    api_key: str | tuple[str, str] | None,
    basic_auth: tuple[str, str] | None,
    options: Mapping[str, Any],
) -> tuple[Any, list[str]]:
    """An `elasticsearch` client and the secrets that went into it.

    Raises:
        ConfigError: Not exactly one of `url` and `cloud_id`, or two kinds of credentials.
        MissingExtraError: The `elasticsearch` package is not installed.
    """
    elasticsearch = require("elasticsearch", "elasticsearch")
    if (url is None) == (cloud_id is None):
        raise ConfigError("give exactly one of `url`, `cloud_id` and `client`.")
    if api_key is not None and basic_auth is not None:
        raise ConfigError("give `api_key` or `basic_auth`, not both.")
    hosts: list[str] | None = None
    if url is not None:
        hosts = [url] if isinstance(url, str) else list(url)
        # A password in an address ends up in logs and error messages sooner or later.
        if any(re.match(r"[a-z]+://[^/]*@", host) for host in hosts):
            raise ConfigError(
                "`url` must not hold a user and password; pass basic_auth=(user, password) instead."
            )
    settings = {"request_timeout": 60.0, **options}
    client = elasticsearch.Elasticsearch(
        hosts, cloud_id=cloud_id, api_key=api_key, basic_auth=basic_auth, **settings
    )
    return client, [*_spellings(api_key), *_spellings(basic_auth)]


def _spellings(credentials: str | tuple[str, str] | None) -> list[str]:
    """A secret as it is, and as it travels in the header."""
    if credentials is None or isinstance(credentials, str):
        return [credentials or ""]
    name, secret = credentials
    return [secret, base64.b64encode(f"{name}:{secret}".encode()).decode()]


def error_reason(body: Any) -> str:
    """The innermost reason of an Elasticsearch error, in one line."""
    error = body.get("error", body) if isinstance(body, Mapping) else body
    if not isinstance(error, Mapping):
        return _first_line(error) if error else "no reason given"
    reasons: list[str] = []
    while isinstance(error, Mapping) and len(reasons) < 4:
        reasons.append(f"{error.get('type', 'error')}: {error.get('reason') or 'no reason given'}")
        error = error.get("caused_by")
    return _first_line("; ".join(reasons))


def _check_majors(status: int, answer: Any) -> None:
    text = str(answer)
    error = answer.get("error") if isinstance(answer, Mapping) else None
    kind = error.get("type") if isinstance(error, Mapping) else None
    # Servers from 8 on know the exception; older ones answer 406 and repeat the header.
    if kind != "media_type_header_exception" and not (status == 406 and "compatible-with" in text):
        return
    newest = re.search(r"either version (\d+)", text)
    wanted = newest.group(1) if newest else "<major version of the server>"
    raise ConfigError(
        "the elasticsearch client is of a newer major version than the server; run: "
        f"pip install 'elasticsearch=={wanted}.*' ({error_reason(answer)})"
    )


def refusal(status: int, reason: str) -> StoreError:
    """The error for a request that the server will not carry out however often it is sent."""
    if status == 401:
        return StoreError(f"the server does not accept the credentials ({reason}).")
    if status == 403:
        return StoreError(f"the credentials do not allow this ({reason}).")
    if "too_many" in reason and "clauses" in reason:
        return StoreError(
            f"the query has more clauses than the server allows ({reason}); set `query_top_k`."
        )
    return StoreError(f"the server refused the request ({reason}).")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    try:
        return max(0.0, float(headers.get("retry-after", "")))
    except ValueError:
        return None  # absent, or a date: then the drawn wait has to do


def _first_line(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 500 else text[:497] + "..."
