"""ONNX graphs of image towers: vision transformers, alone or on a convolutional stem.

Nodes and weights as in `vdr_db.towers.onnx_graphs`; the input is `pixels` `[1, 3, S, S]`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vdr_db.towers.image import HEAD_NORM_EPS
from vdr_db.towers.image_config import HybridConfig, VitConfig
from vdr_db.towers.image_stem import STAGES, ConvolutionalStem
from vdr_db.towers.onnx_graphs import GraphWriter, Weights

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["image_graph"]


def image_graph(
    weights: Weights,
    folder: Path,
    config: VitConfig | HybridConfig,
) -> ModelProto:
    """The graph of a tower of images.

    Args:
        weights: Of body and head by the names of our modules.
        folder: Where the graph will lie.
        config: Of the body.

    Raises:
        MissingExtraError: `onnx` is not installed.
    """
    to = GraphWriter(weights, folder)
    side = config.image_size
    pixels = to.input("pixels", "FLOAT", [1, 3, side, side])
    if isinstance(config, HybridConfig):
        features = _rows(to, _stem(to, pixels), ConvolutionalStem.channels)
        hidden = to.linear(_contrasted(to, features, config.contrast), "body.narrow")
        width = config.output_size
    else:
        step = [config.patch_size] * 2
        patches = to.add("Conv", [pixels, to.weight("body.patch")], strides=step)
        hidden = _rows(to, patches, config.hidden_size)
        width = config.hidden_size
    hidden = to.add("Add", [hidden, to.weight("body.position")])
    hidden = to.norm(hidden, "body.norm", config.norm_eps)
    for layer in range(config.layers):
        hidden = _layer(to, hidden, f"body.layers.{layer}", config)
    if isinstance(config, HybridConfig):
        hidden = to.linear(hidden, "body.output")
    states = to.norm(hidden, "head.norm", HEAD_NORM_EPS)
    return to.model({"states": (states, [config.patches, width])})


def _layer(to: GraphWriter, hidden: str, at: str, config: VitConfig) -> str:
    """Self-attention and feed-forward, each on normalised states and with a residual."""
    inputs = to.linear(to.norm(hidden, f"{at}.attended_norm", config.norm_eps), f"{at}.inputs")
    parts = [f"{inputs}_{name}" for name in ("query", "key", "value")]
    to.nodes.append(to.onnx.helper.make_node("Split", [inputs], parts, axis=1, num_outputs=3))
    attended = to.linear(to.attention(parts, config.heads), f"{at}.attended")
    hidden = to.add("Add", [hidden, attended])
    wide = to.linear(to.norm(hidden, f"{at}.wide_norm", config.norm_eps), f"{at}.up")
    return to.add("Add", [hidden, to.linear(to.activation(wide, config.activation), f"{at}.down")])


def _rows(to: GraphWriter, places: str, channels: int) -> str:
    """A map `[1, C, h, w]` as rows of places, `[P, C]`."""
    flat = to.add("Reshape", [places, to.constant([channels, -1])])
    return to.add("Transpose", [flat], perm=[1, 0])


def _contrasted(to: GraphWriter, rows: str, contrast: float) -> str:
    """Each row moved towards the mean of all."""
    if contrast == 1:
        return rows
    mean = to.add("ReduceMean", [rows, to.constant([0])], keepdims=1)
    apart = to.add("Sub", [rows, mean])
    return to.add("Add", [mean, to.add("Mul", [apart, to.constant(contrast, "float32")])])


def _stem(to: GraphWriter, pixels: str) -> str:
    """EfficientNet-lite0 up to its last feature map, `[1, C, h, w]`."""
    least, most = to.constant(0, "float32"), to.constant(6, "float32")

    def convolved(value: str, name: str, stride: int = 1, *, bounded: bool = True) -> str:
        weight = f"body.stem.{name}.weight"
        channels, inner = to.weights[weight].shape[:2]
        # Where the padding is odd, the extra row and column go to the bottom and the right.
        out = to.add(
            "Conv",
            [value, to.weight(weight), to.weight(f"body.stem.{name}.bias")],
            strides=[stride, stride],
            auto_pad="SAME_UPPER",
            group=channels if inner == 1 and name.endswith("spread") else 1,
        )
        return to.add("Clip", [out, least, most]) if bounded else out

    x = convolved(pixels, "first", 2)
    block = 0
    inputs = to.weights["body.stem.first.weight"].shape[0]
    for repeats, _, first_stride, expansion, outputs in STAGES:
        for repeat in range(repeats):
            at, stride = f"blocks.{block}", first_stride if repeat == 0 else 1
            y = convolved(x, f"{at}.expand") if expansion > 1 else x
            y = convolved(y, f"{at}.spread", stride)
            y = convolved(y, f"{at}.narrow", bounded=False)
            x = to.add("Add", [x, y]) if stride == 1 and inputs == outputs else y
            inputs, block = outputs, block + 1
    return convolved(x, "last")
