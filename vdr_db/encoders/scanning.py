"""Which way the head of a tower takes on the CPU: all scores in fp32, or a scan and exact rest.

Both give the same bits, so the choice is one of time alone, and is made by the clock on the texts
that come: what a scan saves depends on the machine, on the length of texts, and on how well a head
separates columns, which no table knows. The first `START_TOKENS` of a side take the plain way, so
that a single query never pays for the codes of a matrix.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from weakref import WeakKeyDictionary

from vdr_db.kernels import Activation, Backend
from vdr_db.kernels.cpu.scan import Codes
from vdr_db.sparse import SparseRows

__all__ = ["HeadChoice", "codes_of", "head_choices"]

logger = logging.getLogger(__name__)

START_TOKENS = 2048
TRIAL_SECONDS = 0.05
"""How long the plain way is watched before it is known which one is faster."""
WORTH = 0.95
"""A scan must take at most this share of the plain way's time."""

Way = Callable[[], SparseRows]

# Beside the towers, not in them: codes are made anew where a tower is copied or sent.
_codes: WeakKeyDictionary[object, tuple[object, Codes]] = WeakKeyDictionary()


def codes_of(tower: object, weights: object, make: Callable[[], Codes]) -> Codes:
    """Codes of a tower's matrix, made once for each version of its weights.

    Args:
        tower: What they are kept for, as long as it lives.
        weights: Something that changes when the weights do.
        make: Makes them.
    """
    known = _codes.get(tower)
    if known is None or known[0] != weights or not known[1].packed.is_open:
        known = _codes[tower] = (weights, make())
    return known[1]


def head_choices() -> dict[str, HeadChoice]:
    """The choices of both sides of an encoder of texts, nothing known yet."""
    return {"document": HeadChoice(), "query": HeadChoice()}


@dataclass
class Trial:
    """Seconds that both ways took for the same batches."""

    plain: float = 0.0
    scan: float = 0.0


class HeadChoice:
    """The choice for one side of an encoder, remembered for each length of texts.

    Attributes:
        scanned: Texts, or batches of them, whose vectors came from a scan so far.
    """

    def __init__(self) -> None:
        """Starts without knowledge."""
        self.scanned = 0
        self._is_sound = find_spec("onnxruntime") is not None
        self._weights: object = None
        self._tokens = 0
        self._trials: dict[tuple[int, int | None, Activation], Trial] = {}

    def rows(
        self,
        backend: Backend,
        shape: tuple[int, int | None, Activation],
        *,
        tokens: int,
        weights: object,
        is_possible: Callable[[], bool],
        plain: Way,
        scan: Way,
    ) -> SparseRows:
        """Vectors of a text or a batch, by the way that is faster.

        Args:
            backend: `"cpu-int8"` forces a scan where it is possible, all but `"auto"` forbid it.
            shape: States of the longest text, k and activation: what the time depends on.
            tokens: Of all texts.
            weights: Something that changes when the weights do; measurements begin anew then.
            is_possible: Whether this machine and this head can scan; may take a while.
            plain: The way through all scores.
            scan: The way through a scan.
        """
        if backend == "cpu-int8" and is_possible():
            return self._scanned(scan)
        if backend != "auto" or not self._is_sound:
            return plain()
        if weights != self._weights:
            self._weights, self._trials, self._tokens = weights, {}, 0
        self._tokens += tokens
        if self._tokens <= START_TOKENS:
            return plain()
        positions, k, activation = shape
        trial = self._trials.setdefault((positions.bit_length(), k, activation), Trial())
        if trial.plain < TRIAL_SECONDS:
            self._is_sound = is_possible()
            return self._both(plain, scan, trial) if self._is_sound else plain()
        return self._scanned(scan) if trial.scan < WORTH * trial.plain else plain()

    def _scanned(self, scan: Way) -> SparseRows:
        self.scanned += 1
        return scan()

    def _both(self, plain: Way, scan: Way, trial: Trial) -> SparseRows:
        start = time.perf_counter()
        wanted = plain()
        middle = time.perf_counter()
        found = scan()
        trial.plain += middle - start
        trial.scan += time.perf_counter() - middle
        if found != wanted:
            self._is_sound = False
            logger.warning(
                "an int8 scan gave other vectors than the fp32 head on this machine, so it is not "
                'used; please report it, and pass backend="cpu" to silence this.'
            )
        return wanted
