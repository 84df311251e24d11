"""ONNX graphs of our towers, written node by node: bodies with the transform of their head.

A graph reads one item (a text's tokens, an image's pixels) and gives `states` [P, H], after the
head's transform. The product with the vocabulary matrix is no part of it: which columns are wanted
is known only after a scan (`vdr_db.kernels.cpu.scan`), and a graph always computes all its outputs.

Weights stay where they are: initializers point into the safetensors file beside the graph, and
float16 or bfloat16 ones are cast when the graph is loaded.

Source: ONNX operators, opset 20; `MultiHeadAttention` of ONNX Runtime's own domain, which joins
what would be a dozen nodes. Its `SkipLayerNormalization` takes longer than a sum and a norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vdr_db.errors import ConfigError, require
from vdr_db.towers.families import BodyConfig
from vdr_db.towers.stored import StoredTensor

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["GraphWriter", "text_graph"]

OPSET = 20
OWN_OPSET = ("com.microsoft", 1)
IR_VERSION = 9

VDR_NORM_EPS = 1e-5

Weights = Mapping[str, StoredTensor]
"""Weights by the names of our modules, such as `body.layers.0.query.weight`."""


class GraphWriter:
    """Collects the nodes of a graph; every method that computes gives the name of its result."""

    def __init__(self, weights: Weights, folder: Path) -> None:
        """Starts an empty graph.

        Args:
            weights: That its nodes may take.
            folder: Where the graph will lie; the files of the weights lie there or below.
        """
        self.onnx = require("onnx", "export")
        self.folder = folder
        self.weights = weights
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.inputs: list[Any] = []
        self._known: dict[tuple[str, int, int], str] = {}

    def input(self, name: str, kind: str, shape: Sequence[int | str]) -> str:
        """An input of the graph; `kind` is `"INT64"` or `"FLOAT"`."""
        of = self.onnx
        self.inputs.append(
            of.helper.make_tensor_value_info(name, getattr(of.TensorProto, kind), list(shape))
        )
        return name

    def add(self, operator: str, inputs: Sequence[str], domain: str = "", **options: Any) -> str:
        """A node with one output."""
        name = f"{operator.lower()}_{len(self.nodes)}"
        node = self.onnx.helper.make_node(operator, list(inputs), [name], domain=domain, **options)
        self.nodes.append(node)
        return name

    def constant(self, values: Any, dtype: str = "int64") -> str:
        """A small tensor that lies in the graph itself."""
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(
            self.onnx.numpy_helper.from_array(np.asarray(values, np.dtype(dtype)), name)
        )
        return name

    def stored(self, weight: str, rows: slice = slice(None)) -> str:
        """A weight, or neighbouring rows of it, as the file has it: perhaps in half precision."""
        tensor = self.weights[weight]
        start, stop, _ = rows.indices(tensor.shape[0])
        key = (weight, start, stop)
        if key not in self._known:
            of, rest = self.onnx, tensor.shape[1:]
            one = int(np.prod(rest, dtype=np.int64)) * tensor.itemsize
            dtypes = {"F64": "DOUBLE", "F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16"}
            proto = of.TensorProto(
                name=f"{weight}[{start}:{stop}]",
                data_type=getattr(of.TensorProto, dtypes[tensor.dtype]),
                dims=[stop - start, *rest],
                data_location=of.TensorProto.EXTERNAL,
            )
            places = {
                "location": tensor.file.relative_to(self.folder).as_posix(),
                "offset": tensor.offset + start * one,
                "length": (stop - start) * one,
            }
            for name, value in places.items():
                proto.external_data.add(key=name, value=str(value))
            self.initializers.append(proto)
            self._known[key] = proto.name
        return self._known[key]

    def weight(self, name: str, rows: slice = slice(None)) -> str:
        """The same in float32."""
        stored = self.stored(name, rows)
        if self.weights[name].dtype == "F32":
            return stored
        return self.float32(stored)

    def float32(self, value: str) -> str:
        """A cast."""
        return self.add("Cast", [value], to=self.onnx.TensorProto.FLOAT)

    def linear(self, value: str, name: str) -> str:
        """Product of `[P, columns]` rows with a weight, and its bias."""
        inputs = [value, self.weight(f"{name}.weight")]
        if f"{name}.bias" in self.weights:
            inputs.append(self.weight(f"{name}.bias"))
        return self.add("Gemm", inputs, transB=1)

    def norm(self, value: str, name: str, eps: float) -> str:
        """LayerNorm of `[P, H]` rows."""
        parts = [self.weight(f"{name}.{part}") for part in ("weight", "bias")]
        return self.add("LayerNormalization", [value, *parts], axis=-1, epsilon=eps)

    def added_norm(self, value: str, other: str, name: str, eps: float) -> str:
        """LayerNorm of a sum of `[P, H]` rows."""
        return self.norm(self.add("Add", [value, other]), name, eps)

    def activation(self, value: str, name: str) -> str:
        """An activation of a feed-forward part, by its name in config.json.

        Raises:
            ConfigError: It is unknown.
        """
        if name == "gelu":
            return self.add("Gelu", [value])
        if name in ("gelu_new", "gelu_pytorch_tanh"):
            return self.add("Gelu", [value], approximate="tanh")
        if name == "relu":
            return self.add("Relu", [value])
        if name in ("silu", "swish", "quick_gelu"):
            inner = value
            if name == "quick_gelu":
                inner = self.add("Mul", [value, self.constant(1.702, "float32")])
            return self.add("Mul", [value, self.add("Sigmoid", [inner])])
        raise ConfigError(f"activation {name!r} has no ONNX graph; use the runtime 'torch'.")

    def attention(self, parts: Sequence[str], heads: int) -> str:
        """Softmax attention of all rows to all; `parts` are query, key and value, `[P, H]`."""
        axes = self.constant([0])
        wide = [self.add("Unsqueeze", [rows, axes]) for rows in parts]
        attended = self.add("MultiHeadAttention", wide, OWN_OPSET[0], num_heads=heads)
        return self.add("Squeeze", [attended, axes])

    def model(self, outputs: Mapping[str, tuple[str, Sequence[int | str]]]) -> ModelProto:
        """The finished graph.

        Args:
            outputs: Name -> the value that it names, and its shape.
        """
        of = self.onnx
        infos = []
        for name, (value, shape) in outputs.items():
            self.nodes.append(of.helper.make_node("Identity", [value], [name]))
            infos.append(of.helper.make_tensor_value_info(name, of.TensorProto.FLOAT, list(shape)))
        graph = of.helper.make_graph(
            self.nodes, "vdr_db", self.inputs, infos, initializer=self.initializers
        )
        opsets = [of.helper.make_opsetid("", OPSET), of.helper.make_opsetid(*OWN_OPSET)]
        made: ModelProto = of.helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="vdr-db"
        )
        return made


def text_graph(
    weights: Weights,
    folder: Path,
    config: BodyConfig,
    head: str,
) -> ModelProto:
    """The graph of a tower of texts.

    Inputs are `input_ids` and `position_ids`, `[P]` int64.

    Args:
        weights: Of body and head by the names of our modules.
        folder: Where the graph will lie.
        config: Of the body.
        head: `"vdr"`, `"mlm"` or `"mean"`.

    Raises:
        ConfigError: An activation has no operator.
        MissingExtraError: `onnx` is not installed.
    """
    to = GraphWriter(weights, folder)
    ids, places = (to.input(name, "INT64", ["P"]) for name in ("input_ids", "position_ids"))
    words = to.float32(to.add("Gather", [to.stored("body.embeddings.word.weight"), ids]))
    position = to.add("Gather", [to.stored("body.embeddings.position.weight"), places])
    position = to.float32(position)
    hidden = words
    if config.token_types:
        first = to.weight("body.embeddings.token_type.weight", slice(0, 1))
        hidden = to.add("Add", [words, first])
    eps = config.norm_eps
    hidden = to.added_norm(hidden, position, "body.embeddings.norm", eps)
    for layer in range(config.layers):
        at = f"body.layers.{layer}"
        parts = [to.linear(hidden, f"{at}.{name}") for name in ("query", "key", "value")]
        attended = to.linear(to.attention(parts, config.heads), f"{at}.attended")
        hidden = to.added_norm(attended, hidden, f"{at}.attended_norm", eps)
        wide = to.activation(to.linear(hidden, f"{at}.up"), config.activation)
        hidden = to.added_norm(to.linear(wide, f"{at}.down"), hidden, f"{at}.down_norm", eps)
    if head == "mlm":
        changed = to.activation(to.linear(hidden, "head.dense"), config.head_activation)
        states = to.norm(changed, "head.norm", eps)
    elif head == "mean":
        mean = to.add("ReduceMean", [to.linear(hidden, "head.dense"), to.constant([0])])
        states = to.norm(mean, "head.norm", VDR_NORM_EPS)
    else:
        states = to.norm(hidden, "head.norm", VDR_NORM_EPS)
    return to.model({"states": (states, ["P", config.hidden_size])})
