"""Which requests of a test server go wrong, and how; decided from a seed, so that tests repeat."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

__all__ = ["EVERY_FAULT", "FaultPlan"]

EVERY_FAULT = ("429", "503", "reset", "timeout", "413", "slow", "lost_ack")
"""What a request can meet.

| fault      | what happens                                                              |
|------------|---------------------------------------------------------------------------|
| `429`      | refused with Retry-After                                                  |
| `503`      | refused, nothing applied                                                  |
| `reset`    | connection reset before anything is applied                               |
| `timeout`  | no answer until after the client's patience; nothing applied              |
| `413`      | refused as too large, unless it writes a single point                     |
| `slow`     | applied and answered late, within the client's patience                   |
| `lost_ack` | applied, but the connection is reset instead of an answer                 |
"""


@dataclass
class FaultPlan:
    """Chooses a fault, or none, for each request.

    Attributes:
        rates: Fault → share of requests that meet it.
        bursts: `(every, length, fault)`: of each `every` requests the last `length` meet the fault.
        operations: Requests that faults can meet; other ones pass.
        retry_after_s: Whole seconds asked for with `429`.
        hang_s: How long `timeout` keeps silent; more than the client's patience.
        slow_s: How long `slow` takes.
        seed: Seed of the choices.
        injected: How often each fault was chosen.
        seen: How many requests faults could meet.
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    bursts: tuple[int, int, str] | None = None
    operations: Collection[str] = (
        "upsert",
        "retrieve",
        "count",
        "query_batch",
    )
    retry_after_s: int = 1
    hang_s: float = 3.0
    slow_s: float = 0.2
    seed: int = 0
    injected: Counter[str] = field(default_factory=Counter)
    seen: int = 0

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._lock = threading.Lock()
        unknown = set(self.rates) - set(EVERY_FAULT)
        assert not unknown, f"unknown faults {unknown}"

    def choose(self, operation: str, points: int) -> str | None:
        """The fault of the next request, or None."""
        if operation not in self.operations:
            return None
        with self._lock:
            self.seen += 1
            fault = self._drawn()
            if fault == "413" and (operation != "upsert" or points <= 1):
                return None
            if fault is not None:
                self.injected[fault] += 1
            return fault

    def _drawn(self) -> str | None:
        if self.bursts is not None:
            every, length, fault = self.bursts
            if (self.seen - 1) % every >= every - length:
                return fault
        draw = self._chance.random()
        for fault, rate in self.rates.items():
            draw -= rate
            if draw < 0:
                return fault
        return None
