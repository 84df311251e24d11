"""When a call that failed for a passing reason is made again: one policy, one way to wait.

Stores repeat their own calls, and an ingest repeats whole writes. So that the two never multiply,
the outermost of them is in charge: a call made within an attempt of another `Retrier` is tried
once, and what it raises goes out to the one that waits.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from vdr_db.connectors.failures import classify
from vdr_db.connectors.halving import RefusedBatch
from vdr_db.errors import ConfigError, StoreError, StoreUnavailable
from vdr_db.failure import Failure

__all__ = ["Allowance", "Retrier", "RetryPolicy", "Stopped"]

Result = TypeVar("Result")

_IN_CHARGE: ContextVar[Allowance | None] = ContextVar("vdr_db_allowance", default=None)


@dataclass(frozen=True)
class RetryPolicy:
    """Full-jitter exponential waits with a bound on tries and on time.

    The n-th wait is drawn from [0, min(cap_s, base_s * 2^n)], so that many writers do not come back
    together, and is at least what the server asks for by Retry-After.

    Attributes:
        tries: Most calls without progress, the first included.
        base_s: Upper bound of the first wait, in seconds; each further bound is twice as large.
        cap_s: Largest such bound, in seconds.
        deadline_s: Longest time without progress, waits included, in seconds.
    """

    tries: int = 8
    base_s: float = 0.5
    cap_s: float = 30.0
    deadline_s: float = 300.0

    def __post_init__(self) -> None:
        if self.tries < 1 or not (0 < self.base_s <= self.cap_s) or not self.deadline_s > 0:
            raise ConfigError(
                "a retry policy needs tries ≥ 1, 0 < base_s ≤ cap_s and deadline_s > 0, "
                f"got {self}; see `RetryPolicy`."
            )

    def delay_s(self, failures: int, retry_after_s: float | None, chance: random.Random) -> float:
        """Seconds to wait after the n-th failure (n from 1).

        A wait the server asked for is never cut short; a little jitter on top keeps writers that
        were refused together from coming back together.
        """
        bound = min(self.cap_s, self.base_s * 2.0 ** min(failures - 1, 60))
        jitter = chance.uniform(0.0, bound)
        if retry_after_s is None:
            return jitter
        return retry_after_s + min(jitter, 0.1 * retry_after_s + 0.05)


class Stopped(StoreError):
    """A wait was ended because the store was closed or the ingest is stopping at once."""


class Retrier:
    """Repeats calls that may pass later, and counts them in `retries`, for progress reports.

    Setting `stop` ends every wait; `seed` is that of the jitter, and `clock` tells seconds.
    """

    def __init__(
        self,
        policy: RetryPolicy | None = None,
        *,
        stop: threading.Event | None = None,
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy = policy or RetryPolicy()
        self.stop = stop or threading.Event()
        self.chance = random.Random(seed)
        self.clock = clock
        self.retries = 0

    def call(
        self,
        function: Callable[[], Result],
        what: str = "the request",
        *,
        is_splittable: bool = False,
    ) -> Result:
        """The result of a function that may be carried out twice, after as many tries as allowed.

        Raises:
            StoreUnavailable: `what` failed for passing reasons until tries or time ran out.
            RefusedBatch: Smaller requests may pass, and it `is_splittable` into such.
            Stopped: The wait was ended.
        """
        if _IN_CHARGE.get() is not None:
            return function()
        allowance = Allowance(self)
        while True:
            try:
                return allowance.attempt(function)
            except Exception as error:
                failure = classify(error)
                if failure.kind not in ("transient", "timeout"):
                    raise
                allowance.wait(failure, error, what)
                if failure.wants_split and is_splittable:
                    raise RefusedBatch(failure.reason) from error


class Allowance:
    """What is left of the tries and the time of one call.

    Attributes:
        failures: Failed attempts since the last progress.
    """

    def __init__(self, retrier: Retrier) -> None:
        self._retrier = retrier
        self._given_up: BaseException | None = None
        self.progress()

    @staticmethod
    def in_charge() -> Allowance:
        """The one of the outermost call that is being tried, for waits within an attempt."""
        allowance = _IN_CHARGE.get()
        assert allowance is not None, "only within an attempt"
        return allowance

    def attempt(self, function: Callable[[], Result]) -> Result:
        """The function's result; nothing inside of it is repeated by anyone else."""
        if self._retrier.stop.is_set():
            raise Stopped("the call was stopped before it was made; open the store again.")
        token = _IN_CHARGE.set(self)
        try:
            return function()
        finally:
            _IN_CHARGE.reset(token)

    def progress(self) -> None:
        """Starts counting tries and time anew, because something got through."""
        self.failures = 0
        self._began = self._retrier.clock()

    def wait(
        self,
        failure: Failure,
        error: BaseException,
        what: str = "the request",
        *,
        has_tries: bool = True,
    ) -> None:
        """Waits before the next attempt; says what failed last when no tries or no time is left.

        What takes its time by nature has no limit of tries (not `has_tries`), only the deadline.
        """
        if error is self._given_up:  # by a wait within the attempt
            raise error
        policy, retrier = self._retrier.policy, self._retrier
        self.failures += 1
        delay_s = policy.delay_s(self.failures, failure.retry_after_s, retrier.chance)
        spent_s = retrier.clock() - self._began
        is_tried = has_tries and self.failures >= policy.tries
        if is_tried or spent_s + delay_s > policy.deadline_s:
            self._given_up = StoreUnavailable(
                f"{what} failed {self.failures} times in {spent_s:.0f} s, last with: "
                f"{failure.reason.rstrip('.')}; what was acknowledged is safe, so run the same "
                "call again once the server answers.",
                failure=failure,
            )
            raise self._given_up from error
        retrier.retries += 1
        if retrier.stop.wait(delay_s):
            raise Stopped(f"{what} was stopped while it waited ({failure.reason}).") from error
