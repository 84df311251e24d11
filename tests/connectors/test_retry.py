"""Errors of real clients are told apart, waits are bounded, secrets stay out of messages."""

from __future__ import annotations

import pickle
import random
import threading
import time

import httpx
import pytest
from grpc import RpcError, StatusCode
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from vdr_db.connectors.failures import classify, redact
from vdr_db.connectors.halving import RefusedBatch, deliver
from vdr_db.connectors.retry import Retrier, RetryPolicy, Stopped
from vdr_db.errors import (
    ConfigError,
    Failure,
    InputError,
    RejectedRows,
    StoreError,
    StoreMismatch,
    StoreUnavailable,
)

SECRET = "s3cr3t-value-42"


def response(status, text="", headers=None):
    return UnexpectedResponse(status, "reason", text.encode(), httpx.Headers(headers or {}))


class GrpcError(RpcError):
    def __init__(self, code, details):
        self._code, self._details = code, details

    def code(self):
        return self._code

    def details(self):
        return self._details

    def __str__(self):
        return f"<status {self._code}\n details {self._details}>"


class PanicException(BaseException):
    pass


def caused(outer, inner):
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (response(429), "transient"),
        (response(500), "transient"),
        (response(502), "transient"),
        (response(503), "transient"),
        (response(504), "timeout"),
        (response(408), "timeout"),
        (response(413), "too_big"),
        (response(400, "Payload error: JSON payload (40000000 bytes) is larger than"), "too_big"),
        (response(400, "vector is wrong"), "data"),
        (response(422), "data"),
        (response(401), "setup"),
        (response(403), "setup"),
        (response(404), "setup"),
        (ResourceExhaustedResponse("slow down", 3), "transient"),
        (ResponseHandlingException(httpx.ConnectError("refused")), "transient"),
        (ResponseHandlingException(httpx.ReadError("reset")), "transient"),
        (ResponseHandlingException(httpx.RemoteProtocolError("gone")), "transient"),
        (ResponseHandlingException(httpx.WriteTimeout("slow")), "timeout"),
        (ResponseHandlingException(httpx.ReadTimeout("slow")), "timeout"),
        (GrpcError(StatusCode.UNAVAILABLE, "down"), "transient"),
        (GrpcError(StatusCode.ABORTED, "again"), "transient"),
        (GrpcError(StatusCode.RESOURCE_EXHAUSTED, "rate"), "transient"),
        (GrpcError(StatusCode.RESOURCE_EXHAUSTED, "message larger than max"), "too_big"),
        (GrpcError(StatusCode.DEADLINE_EXCEEDED, "late"), "timeout"),
        (GrpcError(StatusCode.INVALID_ARGUMENT, "wrong"), "data"),
        (GrpcError(StatusCode.UNAUTHENTICATED, "who"), "setup"),
        (GrpcError(StatusCode.NOT_FOUND, "where"), "setup"),
        (StoreError("no", failure=Failure("setup", "x")), "setup"),
        (ConnectionResetError(104, "reset"), "transient"),
        (TimeoutError("late"), "timeout"),
        (RejectedRows([1], ["bad"]), "data"),
        (InputError("bad"), "data"),
        (StoreMismatch("other"), "setup"),
        (ConfigError("impossible"), "setup"),
        (StoreUnavailable("later"), "transient"),
        (caused(StoreUnavailable("later"), response(413)), "too_big"),
        (caused(StoreUnavailable("later"), TimeoutError("late")), "timeout"),
        (caused(StoreError("broken"), PanicException("index out of bounds")), "fatal"),
        (PanicException("index out of bounds"), "fatal"),
        (StoreError("broken"), "fatal"),
        (TypeError("our own fault"), "fatal"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_errors_are_told_apart(error, kind):
    assert classify(error).kind == kind


def test_a_waiting_time_is_found_wherever_the_client_puts_it():
    assert classify(ResourceExhaustedResponse("slow down", "7")).retry_after_s == 7
    assert classify(response(429, headers={"Retry-After": "5"})).retry_after_s == 5
    wrapped = caused(StoreUnavailable("x"), response(503, headers={"retry-after": "2.5"}))
    assert classify(wrapped).retry_after_s == 2.5
    dated = response(503, headers={"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"})
    assert classify(dated).retry_after_s is None


def test_refused_rows_keep_their_reasons():
    failure = classify(RejectedRows(["a", 2], ["too long", f"api-key: {SECRET}"]))
    assert failure.rejected is not None
    assert failure.rejected["a"] == "too long"
    assert SECRET not in failure.rejected[2]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (response(413), "too_big"),
        (
            response(
                429, "request larger than rate limiter capacity, please try to split your request"
            ),
            "transient",
        ),
        (
            GrpcError(
                StatusCode.RESOURCE_EXHAUSTED,
                "Operation requires 128 tokens but only 5.9 were available. Retry after 37s",
            ),
            "transient",
        ),
        (
            GrpcError(
                StatusCode.RESOURCE_EXHAUSTED,
                "request larger than rate limiter capacity, please try to split your request",
            ),
            "transient",
        ),
    ],
)
def test_some_refusals_ask_for_smaller_requests(error, kind):
    assert (classify(error).kind, classify(error).wants_split) == (kind, True)
    assert not classify(response(503)).wants_split


def test_a_call_within_an_attempt_of_another_is_tried_once():
    inner, outer = (Retrier(RetryPolicy(tries=3, base_s=0.001)) for _ in range(2))
    calls = []

    def fails():
        calls.append(1)
        raise StoreUnavailable("down")

    with pytest.raises(StoreUnavailable, match="the whole failed 3 times"):
        outer.call(lambda: inner.call(fails), "the whole")
    assert (len(calls), outer.retries, inner.retries) == (3, 2, 0)
    with pytest.raises(StoreUnavailable, match="the part failed 3 times"):
        inner.call(fails, "the part")
    assert len(calls) == 6


def test_a_stop_ends_a_wait():
    stop = threading.Event()
    retrier = Retrier(RetryPolicy(), stop=stop)
    threading.Timer(0.1, stop.set).start()
    began = time.monotonic()
    slow = StoreUnavailable("busy", failure=Failure("transient", "busy", retry_after_s=60.0))

    def fails():
        raise slow

    with pytest.raises(Stopped, match="stopped while it waited"):
        retrier.call(fails)
    assert time.monotonic() - began < 10
    with pytest.raises(Stopped):
        retrier.call(fails)


def test_a_batch_is_halved_around_its_culprits():
    sizes, refused = [], []

    def attempt(part):
        sizes.append(len(part))
        if {3, 40} & set(part):
            raise RefusedBatch("odd")

    deliver(range(50), attempt, lambda part, error: refused.append((part[0], str(error))))
    assert refused == [(3, "odd"), (40, "odd")]
    assert len(sizes) < 25
    seen = []
    deliver(list(range(7)), seen.append, pytest.fail, fitting=lambda part: min(3, len(part)))
    assert seen == [[0, 1, 2], [3, 4, 5], [6]]
    deliver([], pytest.fail, pytest.fail)


def test_errors_that_travel_keep_what_they_mean():
    error = StoreUnavailable("busy", failure=Failure("timeout", "busy", 3.0))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.failure) == ("busy", error.failure)


def test_waits_grow_are_jittered_and_bounded():
    policy = RetryPolicy(base_s=0.5, cap_s=30.0)
    chance = random.Random(1)
    for failures, bound in [(1, 0.5), (2, 1.0), (3, 2.0), (7, 30.0), (200, 30.0)]:
        waits = [policy.delay_s(failures, None, chance) for _ in range(200)]
        assert min(waits) >= 0
        assert max(waits) <= bound
        assert max(waits) > 0.9 * bound
        assert min(waits) < 0.1 * bound
    asked = [policy.delay_s(1, 4.0, chance) for _ in range(50)]
    assert min(asked) >= 4.0
    assert max(asked) <= 4.5


@pytest.mark.parametrize(
    "options", [{"tries": 0}, {"base_s": 0}, {"base_s": 5, "cap_s": 1}, {"deadline_s": 0}]
)
def test_a_policy_that_never_tries_or_never_ends_is_refused(options):
    with pytest.raises(ConfigError, match="retry policy"):
        RetryPolicy(**options)


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{SECRET}@host:6333/collections",
        f"http://{SECRET}@host",
        f"headers {{'api-key': '{SECRET}'}}",
        f"api_key={SECRET}&x=1",
        f"Authorization: Bearer {SECRET}",
        f"authorization: ApiKey {SECRET}",
        f'"password": "{SECRET}"',
        f"token {SECRET}",
    ],
)
def test_secrets_are_taken_out(text):
    assert SECRET not in redact(text)
    assert SECRET not in classify(response(500, text)).reason


def test_reasons_are_one_short_line():
    reason = classify(response(503, "line\nbreak " * 500)).reason
    assert "\n" not in reason
    assert len(reason) <= 300
