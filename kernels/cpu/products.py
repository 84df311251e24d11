"""Largest products of rows with the states of one item, in ONNX Runtime: fp32 and 8 bit integers.

    largest[s] = max over positions p of rows[s] . states[p]                                    [S]

Rows stand on the left, so that the maximum runs along neighbouring numbers, and are an input of
the graph, so that no second copy of them is packed and held. Two graphs of three nodes serve every
size; they are written out here as bytes, since only exports need the package `onnx`.

Source: ONNX operators, opset 18; the encoding of Protocol Buffers, and `onnx.proto` for the numbers
of the fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vdr_db.errors import require
from vdr_db.forks import end_children_at_once, leak, renew_after_fork

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

_FLOAT, _UINT8, _INT8, _INT32, _INT64 = 1, 2, 3, 6, 7
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
            self._open[key] = _opened(is_integer=is_integer, threads=threads)
        return self._open[key]

    def after_fork(self) -> None:
        """Leaves them alone for good: their threads stayed with the parent."""
        for session in self._open.values():
            leak(session)
        self._open = {}


_sessions = _Sessions()


def _opened(*, is_integer: bool, threads: int | None) -> InferenceSession:
    runtime = require("onnxruntime", "onnx")
    end_children_at_once()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session: InferenceSession = runtime.InferenceSession(
        product_graph(is_integer=is_integer), options, providers=["CPUExecutionProvider"]
    )
    return session


def product_graph(*, is_integer: bool) -> bytes:
    """The model of one product: `rows` and `states` to `largest`, as ONNX Runtime reads it."""
    axes = _tensor("axes", _INT64, [1], np.int64(1).tobytes())
    zero = _tensor("zero", _UINT8, [], np.uint8(CODE_ZERO).tobytes())
    product = (
        ["MatMulInteger", "rows", "turned", "zero"] if is_integer else ["MatMul", "rows", "turned"]
    )
    kinds = (_UINT8, _INT8, _INT32) if is_integer else (_FLOAT, _FLOAT, _FLOAT)
    graph = [
        _field(1, _node("turned", "Transpose", "states", perm=[1, 0])),
        _field(1, _node("products", *product)),
        _field(1, _node("largest", "ReduceMax", "products", "axes", keepdims=0)),
        _field(2, b"largest_products"),
        _field(5, axes),
        *([_field(5, zero)] if is_integer else []),
        _field(11, _value("rows", kinds[0], ["S", "H"])),
        _field(11, _value("states", kinds[1], ["P", "H"])),
        _field(12, _value("largest", kinds[2], ["S"])),
    ]
    return b"".join(
        [_field(1, _IR_VERSION), _field(7, b"".join(graph)), _field(8, _field(2, _OPSET))]
    )


def _node(output: str, operator: str, *inputs: str, **options: int | list[int]) -> bytes:
    parts = [_field(1, name.encode()) for name in inputs]
    parts += [_field(2, output.encode()), _field(4, operator.encode())]
    for name, value in options.items():
        of = [_field(1, name.encode())]
        if isinstance(value, int):
            of += [_field(3, value), _field(20, 2)]
        else:
            of += [*(_field(8, one) for one in value), _field(20, 7)]
        parts.append(_field(5, b"".join(of)))
    return b"".join(parts)


def _tensor(name: str, kind: int, shape: list[int], raw: bytes) -> bytes:
    dims = [_field(1, size) for size in shape]
    return b"".join([*dims, _field(2, kind), _field(8, name.encode()), _field(9, raw)])


def _value(name: str, kind: int, shape: list[str]) -> bytes:
    dims = b"".join(_field(1, _field(2, size.encode())) for size in shape)
    tensor = _field(1, kind) + _field(2, dims)
    return _field(1, name.encode()) + _field(2, _field(1, tensor))


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a message: a number, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
