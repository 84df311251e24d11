"""The one door to a search server: requests, retries, and its errors in our words.

Works over an `elasticsearch` client (8.11 to 9.x) and, because the requests are the same, over an
`opensearch-py` client. The client's own retries are switched off: they know neither Retry-After nor
a deadline for the whole.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vdr_db.connectors.failures import (
    classify,
    failure_of_status,
    one_line,
    redact,
    told,
    wait_asked_for,
)
from vdr_db.connectors.retry import Retrier
from vdr_db.errors import ConfigError, StoreError, StoreUnavailable, require
from vdr_db.failure import Failure

__all__ = ["Reply", "Transport", "busy", "connect", "error_reason", "refusal"]

_LONGEST_REASON = 500


@dataclass(frozen=True)
class Reply:
    """An answer: HTTP status and parsed JSON body."""

    status: int
    body: Any


class Transport:
    """Sends requests through an `elasticsearch` or `opensearch-py` client.

    Args:
        client: The client; another one is a `ConfigError`.
        retrier: Makes requests again that failed for a passing reason.
        secrets: Texts that must never appear in an error.
    """

    def __init__(
        self, client: Any, retrier: Retrier | None = None, *, secrets: Sequence[str] = ()
    ) -> None:
        self.retrier = retrier or Retrier()
        self._secrets = tuple(secret for secret in secrets if secret)
        self._version: tuple[int, int] | None = None
        self._is_opensearch = type(client).__module__.split(".")[0] == "opensearchpy"
        if self._is_opensearch and not _is_async(client):
            self._client = client
        elif (
            not _is_async(client)
            and hasattr(client, "options")
            and hasattr(client, "perform_request")
        ):
            self._client = client.options(max_retries=0, retry_on_timeout=False)
        else:
            raise ConfigError(
                "`client` must be an elasticsearch.Elasticsearch (8.11 or newer) or "
                f"opensearchpy.OpenSearch object, got {type(client).__module__}."
                f"{type(client).__name__}; asynchronous clients are not supported."
            )

    def __repr__(self) -> str:
        return f"Transport({'opensearch-py' if self._is_opensearch else 'elasticsearch'})"

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        allow: Sequence[int] = (),
    ) -> Reply:
        """Sends a request until it is answered. Send only what may be carried out twice.

        Args:
            method: HTTP method.
            path: Path with a leading slash, names in it already quoted.
            body: JSON, or bytes of newline-delimited JSON.
            params: Query parameters.
            allow: Statuses at and above 400 that are returned rather than raised.
        """
        return self.retrier.call(lambda: self.once(method, path, body, params=params, allow=allow))

    def once(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        allow: Sequence[int] = (),
    ) -> Reply:
        """Sends a request once; a passing failure is `StoreUnavailable`."""
        headers = {"accept": "application/json"}
        if body is not None:
            kind = "x-ndjson" if isinstance(body, bytes) else "json"
            headers["content-type"] = f"application/{kind}"
        send = self._send_opensearch if self._is_opensearch else self._send_elasticsearch
        status, answer, retry_after = send(method, path, headers, dict(params or {}), body)
        if status in (400, 406):
            _check_majors(status, answer)
        if status < 300 or status in allow:
            self._check_shards(method, path, answer)
            return Reply(status, answer)
        reason = self._scrub(f"{method} {path}: {status} {error_reason(answer)}")
        failure = busy(status, reason, retry_after)
        if failure is not None:
            raise StoreUnavailable(reason, failure=failure)
        raise refusal(status, reason)

    def _check_shards(self, method: str, path: str, answer: Any) -> None:
        """Refuses the answer of some shards for that of all."""
        shards = answer.get("_shards") if isinstance(answer, Mapping) else None
        if isinstance(shards, Mapping) and shards.get("failed"):
            told = f"{shards['failed']} of {shards.get('total')} shards failed"
            reason = f"{method} {path}: {told}"
            raise StoreUnavailable(reason, failure=Failure("transient", reason))

    def version(self) -> tuple[int, int]:
        """Major and minor version of the server."""
        if self._version is None:
            number = self.call("GET", "/").body["version"]["number"]
            major, minor = str(number).split(".")[:2]
            self._version = int(major), int(minor)
        return self._version

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
            return error.status_code, error.body, wait_asked_for(error.meta.headers)
        except transport.TlsError as error:
            raise self._insecure(error, "`ca_certs` or `ssl_assert_fingerprint`") from error
        except (transport.TransportError, transport.SerializationError) as error:
            raise self._unanswered(method, path, error) from None
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
            raise self._insecure(error, "the client's TLS options") from error
        except (opensearchpy.ConnectionError, opensearchpy.SerializationError) as error:
            raise self._unanswered(method, path, error) from None
        except opensearchpy.TransportError as error:
            return int(error.status_code), error.info, None
        return 200, answer, None

    def _insecure(self, error: Exception, options: str) -> StoreError:
        told = f"no secure connection ({self._scrub(str(error))}); check {options}."
        return StoreError(told, failure=Failure("setup", "no secure connection"))

    def _unanswered(self, method: str, path: str, error: Exception) -> StoreUnavailable:
        # To be raised unchained: what a client puts in its errors is not ours to vouch for.
        reason = f"{method} {path}: {told(error, self._secrets)}"
        is_late = classify(error).kind == "timeout"
        failure = Failure("timeout" if is_late else "transient", reason)
        return StoreUnavailable(reason, failure=failure)

    def _scrub(self, text: str) -> str:
        return redact(text, self._secrets)


def _is_async(client: Any) -> bool:
    return type(client).__name__.startswith("Async")


def connect(
    *,
    url: str | Sequence[str] | None,
    cloud_id: str | None,
    api_key: str | tuple[str, str] | None,
    basic_auth: tuple[str, str] | None,
    options: Mapping[str, Any],
) -> tuple[Any, list[str]]:
    """An `elasticsearch` client and the secrets that went into it."""
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
        return one_line(error, _LONGEST_REASON) if error else "no reason given"
    reasons: list[str] = []
    while isinstance(error, Mapping) and len(reasons) < 4:
        reasons.append(f"{error.get('type', 'error')}: {error.get('reason') or 'no reason given'}")
        error = error.get("caused_by")
    return one_line("; ".join(reasons), _LONGEST_REASON)


def _check_majors(status: int, answer: Any) -> None:
    text = str(answer)
    error = answer.get("error") if isinstance(answer, Mapping) else None
    kind = error.get("type") if isinstance(error, Mapping) else None
    # Servers from 8 on know the exception; older ones answer 406 and repeat the header.
    if kind != "media_type_header_exception" and not (status == 406 and "compatible-with" in text):
        return
    newest, found = (re.search(rf"{told} (\d+)", text) for told in ("either version", "found"))
    wanted = newest[1] if newest else "<major version of the server>"
    is_older = newest and found and int(found[1]) < int(newest[1])
    raise ConfigError(
        f"the elasticsearch client is of {'an older' if is_older else 'a newer'} major version "
        f"than the server; run: pip install 'elasticsearch=={wanted}.*' ({error_reason(answer)})"
    )


def busy(status: int, reason: str, retry_after_s: float | None = None) -> Failure | None:
    """What a status means that passes; `None` for all others."""
    failure = failure_of_status(status, reason, retry_after_s)
    return failure if failure and failure.kind in ("transient", "timeout") else None


def refusal(status: int, reason: str) -> StoreError:
    """The error for a request that the server will not carry out however often it is sent."""
    if status == 401:
        message = f"the server does not accept the credentials ({reason})."
    elif status == 403:
        message = f"the credentials do not allow this ({reason})."
    elif "too_many" in reason and "clauses" in reason:
        message = (
            f"the query has more clauses than the server allows ({reason}): tokens of the query "
            "(fewer with `query_top_k`), words of a text and conditions of a filter count; shorten "
            "what is long, or raise indices.query.bool.max_clause_count there."
        )
    elif 300 <= status < 400:
        message = f"the server sends the request elsewhere ({reason}); use that address instead."
    else:
        message = f"the server refused the request ({reason})."
    return StoreError(message, failure=Failure("setup", reason))
