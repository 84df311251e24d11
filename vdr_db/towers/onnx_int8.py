"""A body whose linear layers run in 8 bit integers: the fp32 graph, rewritten when it is loaded.

Every `Gemm` of a graph, `y = x W^T + b`, becomes a product of integers. Each row of x has a scale s
and an offset o of its own, each row of W a scale c:

    x ~ s q + o, q in 0..255        W ~ c r, r in -127..127        y = s c (q . r) + o c sum(r) + b

so that a token's numbers do not depend on what stands beside it. Weights are rounded by nodes that
ONNX Runtime folds into constants: they stay in their file, and only integers stay in memory. Norms,
attention and activations are left as they are.

Source: ONNX operators, opset 18; `MatMulIntegerToFloat` of ONNX Runtime's own domain, which
multiplies with the scales of W while products are in cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vdr_db.kernels.cpu.messages import KINDS, field, fields, node, tensor

__all__ = ["weight_files", "with_integers"]

LEVELS = 127
_CONSTANTS: dict[str, npt.NDArray[Any]] = {
    "int8.axis": np.array([1], np.int64),
    "int8.flat": np.array([-1], np.int64),
    "int8.one": np.array(1, np.float32),
    "int8.least": np.array(1e-30, np.float32),  # scale of rows of zeros
    "int8.to_rows": np.array(1 / 255, np.float32),
    "int8.to_weights": np.array(1 / LEVELS, np.float32),
    "int8.zero": np.array(0, np.uint8),
    "int8.signed_zero": np.array(0, np.int8),
    "int8.middle": np.array(LEVELS + 1, np.uint8),
    "int8.middle_as_float": np.array(LEVELS + 1, np.float32),
}


def weight_files(model: bytes) -> set[str]:
    """The files that a graph's weights lie in, as it names them.

    Raises:
        ValueError: It is no graph.
    """
    found = set()
    for graph in _messages(model, 7):
        for stored in _messages(graph, 5):
            entries = (dict(fields(entry)) for entry in _messages(stored, 13))
            found |= {bytes(entry[2]).decode() for entry in entries if entry[1] == b"location"}
    return found


def with_integers(
    model: bytes, *, is_signed: bool, moved: Mapping[str, str] | None = None
) -> bytes:
    """A graph of `vdr_db.towers.onnx_graphs` with integers in its linear layers.

    Args:
        model: The graph as its file has it.
        is_signed: Whether weights are signed: faster, and exact where unsigned times signed bytes
            are (`vdr_db.kernels.cpu.products.exact_levels`). Results are the same.
        moved: Names of files with weights -> what they are called now.

    Raises:
        ValueError: It is no graph.
    """
    return b"".join(
        field(
            number,
            _graph(value, is_signed, moved or {})
            if number == 7 and isinstance(value, bytes)
            else value,
        )
        for number, value in fields(model)
    )


def _graph(graph: bytes, is_signed: bool, moved: Mapping[str, str]) -> bytes:
    parts = [field(5, tensor(name, values)) for name, values in _CONSTANTS.items()]
    known: set[str] = set()
    for number, value in fields(graph):
        made = None
        if number == 1 and isinstance(value, bytes):
            made = _linear(value, known, is_signed)
        elif number == 5 and isinstance(value, bytes) and moved:
            value = _moved(value, moved)
        parts += [field(number, value)] if made is None else [field(1, one) for one in made]
    return b"".join(parts)


def _moved(stored: bytes, moved: Mapping[str, str]) -> bytes:
    """A tensor whose numbers lie in a file that is called something else now."""
    parts = []
    for number, value in fields(stored):
        if number == 13 and isinstance(value, bytes):
            entry = dict(fields(value))
            if entry[1] == b"location":
                name = moved[bytes(entry[2]).decode()]
                value = field(1, b"location") + field(2, name.encode())
        parts.append(field(number, value))
    return b"".join(parts)


def _messages(message: bytes, number: int) -> Iterator[bytes]:
    """The messages in one field of another."""
    return (
        value for found, value in fields(message) if found == number and isinstance(value, bytes)
    )


def _linear(message: bytes, known: set[str], is_signed: bool) -> list[bytes] | None:
    """Nodes in the place of one that is a linear layer, None for any other."""
    found: dict[int, list[str]] = {1: [], 2: [], 4: []}
    for number, value in fields(message):
        if number in found and isinstance(value, bytes):
            found[number].append(value.decode())
    if found[4] != ["Gemm"]:
        return None
    (rows, weight, *bias), (out,) = found[1], found[2]
    made = [] if rows in known else list(_rounded_rows(rows))
    known.add(rows)
    return [*made, *_rounded_weight(weight, out, is_signed), *_product(rows, out, bias, is_signed)]


def _rounded_rows(x: str) -> Iterator[bytes]:
    yield node(f"{x}.most", "ReduceMax", x, "int8.axis")
    yield node(f"{x}.offset", "ReduceMin", x, "int8.axis")
    yield node(f"{x}.range", "Sub", f"{x}.most", f"{x}.offset")
    yield node(f"{x}.step", "Mul", f"{x}.range", "int8.to_rows")
    yield node(f"{x}.scale", "Max", f"{x}.step", "int8.least")
    yield node(f"{x}.above", "Sub", x, f"{x}.offset")
    yield node(f"{x}.steps", "Div", f"{x}.above", f"{x}.scale")
    yield node(f"{x}.codes", "QuantizeLinear", f"{x}.steps", "int8.one", "int8.zero")


def _rounded_weight(weight: str, out: str, is_signed: bool) -> Iterator[bytes]:
    """All of it constant: `codes` `[columns, rows]`, `scales` `[rows]`, `sums` `[1, rows]`."""
    of = f"{out}.weight"
    yield node(f"{of}.sizes", "Abs", weight)
    yield node(f"{of}.most", "ReduceMax", f"{of}.sizes", "int8.axis")
    yield node(f"{of}.step", "Mul", f"{of}.most", "int8.to_weights")
    yield node(f"{of}.scale", "Max", f"{of}.step", "int8.least")
    yield node(f"{of}.ratios", "Div", weight, f"{of}.scale")
    yield node(f"{of}.whole", "Round", f"{of}.ratios")
    steps = f"{of}.whole"
    if not is_signed:
        yield node(f"{of}.raised", "Add", steps, "int8.middle_as_float")
        steps = f"{of}.raised"
    yield node(f"{of}.bytes", "Cast", steps, to=KINDS["int8" if is_signed else "uint8"])
    yield node(f"{of}.codes", "Transpose", f"{of}.bytes", perm=[1, 0])
    yield node(f"{of}.scales", "Reshape", f"{of}.scale", "int8.flat")
    yield node(f"{of}.sum", "ReduceSum", f"{of}.whole", "int8.axis")
    yield node(f"{of}.scaled", "Mul", f"{of}.sum", f"{of}.scale")
    yield node(f"{of}.sums", "Transpose", f"{of}.scaled", perm=[1, 0])


def _product(x: str, out: str, bias: list[str], is_signed: bool) -> Iterator[bytes]:
    of = f"{out}.weight"
    zeros = ("int8.zero", "int8.signed_zero" if is_signed else "int8.middle")
    yield node(
        f"{out}.products",
        "MatMulIntegerToFloat",
        *(f"{x}.codes", f"{of}.codes", "int8.one", f"{of}.scales", *zeros),
        domain="com.microsoft",
    )
    yield node(f"{out}.scaled", "Mul", f"{out}.products", f"{x}.scale")
    yield node(f"{out}.rest", "Gemm", f"{x}.offset", f"{of}.sums", *bias)
    yield node(out, "Add", f"{out}.scaled", f"{out}.rest")
