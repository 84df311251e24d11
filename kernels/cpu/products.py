"""Largest products of rows with the states of one item, in ONNX Runtime: fp32 and 8 bit integers.

    largest[s] = max over positions p of rows[s] . states[p]                                    [S]

In fp32 rows stand on the left, so that the maximum runs along neighbouring numbers, and are an
input of the graph: any rows can be asked for, and no second copy of them is held. In integers they
are constants on the right, which ONNX Runtime packs once and holds in that form alone; products are
small enough to be in cache when NumPy takes their maximum along the positions, in a tenth of the
time of `ReduceMax`.

Source: ONNX operators, opset 18.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vdr_db.forks import leak, renew_after_fork
from vdr_db.kernels.cpu.messages import field, node, tensor, value
from vdr_db.kernels.cpu.sessions import opened

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__ = ["PackedRows", "exact_levels", "largest", "rows_are_independent"]

FloatArray = npt.NDArray[np.float32]

BLOCK_PRODUCTS = 1 << 20
"""Products held at once, 4 MB; they stay in cache until their maximum is taken."""
LEAST_ROWS = 2048
MOST_POSITIONS = 512
ROW_MULTIPLE = 16

PACKED_ROWS = 4096
"""Rows of one packed block: larger ones leave the cache, each one costs a call."""

_OPSET, _IR_VERSION = 18, 8


def largest(rows: FloatArray, states: FloatArray, threads: int | None) -> FloatArray:
    """Largest product of each row with any state.

    A row's result has the same bits whatever rows stand beside it; `rows_are_independent` puts
    that to the test.

    Args:
        rows: `[S, H]`.
        states: `[P, H]`, P of at least 1.
        threads: Of ONNX Runtime; None for one a core.

    Returns:
        `[S]`.
    """
    session = _sessions.get(threads)
    found: FloatArray | None = None
    for first in range(0, len(states), MOST_POSITIONS):
        block = np.ascontiguousarray(states[first : first + MOST_POSITIONS])
        maxima = np.empty(len(rows), np.float32)
        for start, stop in _row_blocks(len(rows), len(block)):
            part = rows[start:stop]
            # Few rows are filled up: libraries have other kernels for narrow products, and split
            # work among threads along the positions where they are more than the rows.
            wanted = -(-max(stop - start, len(block)) // ROW_MULTIPLE) * ROW_MULTIPLE
            if wanted > stop - start and len(rows) < LEAST_ROWS:
                part = np.concatenate(
                    [part, np.zeros((wanted - len(part), part.shape[1]), part.dtype)]
                )
            (out,) = session.run(None, {"rows": part, "states": block})
            maxima[start:stop] = out[: stop - start]
        found = maxima if found is None else np.maximum(found, maxima)
    assert found is not None
    return found


class PackedRows:
    """Rows of 8 bit integers, held as ONNX Runtime packs them.

    Attributes:
        levels: Largest integer of states; 0 where no product is exact.
        zero: The code of 0 in states, which are unsigned: the faster kind of product.
        is_open: False in a forked process, where the sessions stayed with the parent.
        nbytes: Of the rows, about what is held.
    """

    def __init__(self, levels: int, threads: int | None) -> None:
        """No rows yet.

        Args:
            levels: Largest integer of states, see `exact_levels`.
            threads: Of ONNX Runtime; None for one a core.
        """
        self.levels, self.zero = levels, levels + 1
        self.is_open = True
        self.nbytes = 0
        self._threads = threads
        self._blocks: list[tuple[slice, InferenceSession]] = []
        self._count = 0
        renew_after_fork(self)

    def add(self, rows: npt.NDArray[np.int8]) -> None:
        """Packs `[n, H]` rows as the next ones, best `PACKED_ROWS` of them."""
        place = slice(self._count, self._count + len(rows))
        graph = integer_graph(rows, self.zero)
        # Else each block would keep the memory of its products.
        self._blocks.append((place, opened(graph, self._threads, keeps_memory=False)))
        self._count += len(rows)
        self.nbytes += rows.nbytes

    def largest(self, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
        """Largest product of each row with any state.

        Args:
            codes: `[P, H]`, `zero` more than the integers of the states, P of at least 1.

        Returns:
            `[S]`.
        """
        found = np.full(self._count, np.iinfo(np.int32).min, np.int32)
        step = BLOCK_PRODUCTS // PACKED_ROWS
        for first in range(0, len(codes), step):
            block = codes[first : first + step]
            for place, session in self._blocks:
                (products,) = session.run(None, {"states": block})
                np.maximum(found[place], products.max(0), out=found[place])
        return found

    def after_fork(self) -> None:
        """Leaves the sessions alone for good: their threads stayed with the parent."""
        leak(self._blocks)
        self._blocks, self.is_open = [], False


@lru_cache(maxsize=16)
def exact_levels(threads: int | None) -> int:
    """Largest integer of tokens whose products come out exact on this machine; 0 if there is none.

    Processors without instructions for dot products of bytes add up pairs of products in 16 bits
    and cut off what does not fit: with rows of full range, tokens must keep to 6 bits and a sign.
    """
    H = 256
    rng = np.random.default_rng(0)
    rows = rng.integers(-127, 128, (48, H)).astype(np.int8)
    rows[:4] = [[-127], [127], [1], [-1]]
    for levels in (127, 63):
        packed = PackedRows(levels, threads)
        packed.add(rows)
        states = rng.integers(-levels, levels + 1, (40, H))
        states[0], states[1] = levels, -levels
        for some in (states, states[:16], states[:1], states[1:2]):
            wanted = (rows.astype(np.int64) @ some.T).max(1)
            if not np.array_equal(packed.largest((some + packed.zero).astype(np.uint8)), wanted):
                break
        else:
            return levels
    return 0


@lru_cache(maxsize=64)
def rows_are_independent(H: int, threads: int | None) -> bool:
    """Whether a row's largest product has the same bits among many rows and among few."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((LEAST_ROWS, H)).astype(np.float32)
    states = rng.standard_normal((MOST_POSITIONS, H)).astype(np.float32)
    for positions in (1, 5, 16, 33, 64, 100, 250, MOST_POSITIONS):
        whole = largest(rows, states[:positions], threads)
        for count in (1, 40, 300, 700):
            chosen = rng.permutation(LEAST_ROWS)[:count]
            if not np.array_equal(
                largest(rows[chosen], states[:positions], threads), whole[chosen]
            ):
                return False
    return True


def _row_blocks(rows: int, positions: int) -> Iterator[tuple[int, int]]:
    """Rows in blocks of nearly one size, so that the last is no narrow one."""
    most = max(LEAST_ROWS, BLOCK_PRODUCTS // max(positions, 1))
    count = -(-rows // most)
    bounds = [rows * i // count for i in range(count + 1)] if count else [0]
    return pairwise(bounds)


class _Sessions:
    """Sessions of products in fp32 by threads; a forked process opens its own."""

    def __init__(self) -> None:
        self._open: dict[int | None, InferenceSession] = {}
        renew_after_fork(self)

    def get(self, threads: int | None) -> InferenceSession:
        if threads not in self._open:
            self._open[threads] = opened(float_graph(), threads)
        return self._open[threads]

    def after_fork(self) -> None:
        """Leaves them alone for good: their threads stayed with the parent."""
        leak(self._open)
        self._open = {}


_sessions = _Sessions()


def float_graph() -> bytes:
    """The model of `largest`: `rows` and `states` to `largest`, as ONNX Runtime reads it."""
    return _model(
        field(1, node("turned", "Transpose", "states", perm=[1, 0])),
        field(1, node("products", "MatMul", "rows", "turned")),
        field(1, node("largest", "ReduceMax", "products", "axes", keepdims=0)),
        field(5, tensor("axes", np.array([1], np.int64))),
        field(11, value("rows", "float32", ["S", "H"])),
        field(11, value("states", "float32", ["P", "H"])),
        field(12, value("largest", "float32", ["S"])),
    )


def integer_graph(rows: npt.NDArray[np.int8], zero: int) -> bytes:
    """The model of a packed block: `states` `[P, H]` to `products` `[P, S]`."""
    return _model(
        field(1, node("products", "MatMulInteger", "states", "turned", "zero")),
        field(5, tensor("turned", np.ascontiguousarray(rows.T))),
        field(5, tensor("zero", np.array(zero, np.uint8))),
        field(11, value("states", "uint8", ["P", "H"])),
        field(12, value("products", "int32", ["P", "S"])),
    )


def _model(*parts: bytes) -> bytes:
    graph = b"".join([*parts, field(2, b"largest_products")])
    return b"".join([field(1, _IR_VERSION), field(7, graph), field(8, field(2, _OPSET))])
