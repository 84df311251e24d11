"""Largest products of rows with the states of one item, in ONNX Runtime: fp32 and 8 bit integers.

    largest[s] = max over positions p of rows[s] . states[p]                                    [S]

Rows stand on the left, so that the maximum runs along neighbouring numbers, and are an input of
the graph, so that no second copy of them is packed and held. Two graphs of three nodes serve every
size.

Source: ONNX operators, opset 18.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vdr_db.forks import leak, renew_after_fork
from vdr_db.kernels.cpu.messages import field, node, tensor, value
from vdr_db.kernels.cpu.sessions import opened

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__ = ["CODE_ZERO", "exact_levels", "largest", "largest_of_codes", "rows_are_independent"]

FloatArray = npt.NDArray[np.float32]

CODE_ZERO = 128
"""What stands for 0 in the codes of rows, which are unsigned: the faster kind of product."""

BLOCK_PRODUCTS = 1 << 20
"""Products held at once, 4 MB; they stay in cache until their maximum is taken."""
LEAST_ROWS = 2048
MOST_POSITIONS = 512
ROW_MULTIPLE = 16

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
    session = _sessions.get(is_integer=False, threads=threads)
    return _in_blocks(session, rows, states, np.float32)


def largest_of_codes(
    codes: npt.NDArray[np.uint8], tokens: npt.NDArray[np.int8], threads: int | None
) -> npt.NDArray[np.int32]:
    """The same for integers: `codes` `[S, H]`, of which `CODE_ZERO` means 0, and `[P, H]`.

    Exact where the tokens keep to `exact_levels`.
    """
    session = _sessions.get(is_integer=True, threads=threads)
    return _in_blocks(session, codes, tokens, np.int32)


@lru_cache(maxsize=16)
def exact_levels(threads: int | None) -> int:
    """Largest integer of tokens whose products come out exact on this machine; 0 if there is none.

    Processors without instructions for dot products of bytes add up pairs of products in 16 bits
    and cut off what does not fit: with rows of full range, tokens must keep to 6 bits and a sign.
    """
    H = 256
    rng = np.random.default_rng(0)
    codes = rng.integers(1, 256, (48, H)).astype(np.uint8)
    codes[:4] = [[1], [255], [128], [127]]
    for levels in (127, 63):
        tokens = rng.integers(-levels, levels + 1, (16, H)).astype(np.int8)
        tokens[0], tokens[1] = levels, -levels
        for some in (tokens, tokens[:1], tokens[1:2]):
            wanted = (codes.astype(np.int64) - CODE_ZERO) @ some.T.astype(np.int64)
            if not np.array_equal(largest_of_codes(codes, some, threads), wanted.max(1)):
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


def _in_blocks(
    session: InferenceSession,
    rows: npt.NDArray[Any],
    states: npt.NDArray[Any],
    dtype: type[np.generic],
) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] | None = None
    for first in range(0, len(states), MOST_POSITIONS):
        block = np.ascontiguousarray(states[first : first + MOST_POSITIONS])
        maxima = np.empty(len(rows), dtype)
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


def _row_blocks(rows: int, positions: int) -> Iterator[tuple[int, int]]:
    """Rows in blocks of nearly one size, so that the last is no narrow one."""
    most = max(LEAST_ROWS, BLOCK_PRODUCTS // max(positions, 1))
    count = -(-rows // most)
    bounds = [rows * i // count for i in range(count + 1)] if count else [0]
    return pairwise(bounds)


class _Sessions:
    """Sessions by kind of numbers and by threads; a forked process opens its own."""

    def __init__(self) -> None:
        self._open: dict[tuple[bool, int | None], InferenceSession] = {}
        renew_after_fork(self)

    def get(self, *, is_integer: bool, threads: int | None) -> InferenceSession:
        key = (is_integer, threads)
        if key not in self._open:
            self._open[key] = opened(product_graph(is_integer=is_integer), threads)
        return self._open[key]

    def after_fork(self) -> None:
        """Leaves them alone for good: their threads stayed with the parent."""
        for session in self._open.values():
            leak(session)
        self._open = {}


_sessions = _Sessions()


def product_graph(*, is_integer: bool) -> bytes:
    """The model of one product: `rows` and `states` to `largest`, as ONNX Runtime reads it."""
    axes = tensor("axes", np.array([1], np.int64))
    zero = tensor("zero", np.array(CODE_ZERO, np.uint8))
    product = (
        ["MatMulInteger", "rows", "turned", "zero"] if is_integer else ["MatMul", "rows", "turned"]
    )
    kinds = ("uint8", "int8", "int32") if is_integer else ("float32",) * 3
    graph = [
        field(1, node("turned", "Transpose", "states", perm=[1, 0])),
        field(1, node("products", *product)),
        field(1, node("largest", "ReduceMax", "products", "axes", keepdims=0)),
        field(2, b"largest_products"),
        field(5, axes),
        *([field(5, zero)] if is_integer else []),
        field(11, value("rows", kinds[0], ["S", "H"])),
        field(11, value("states", kinds[1], ["P", "H"])),
        field(12, value("largest", kinds[2], ["S"])),
    ]
    return b"".join([field(1, _IR_VERSION), field(7, b"".join(graph)), field(8, field(2, _OPSET))])
