"""Random weights of EfficientNet-lite0, the stem of hybrid image bodies, as they are published."""

from __future__ import annotations

import torch

# Kernel, stride, expansion, input and output channels of each block, as EfficientNet-lite0 has it.
BLOCKS = [
    (3, 1, 1, 32, 16),
    (3, 2, 6, 16, 24),
    (3, 1, 6, 24, 24),
    (5, 2, 6, 24, 40),
    (5, 1, 6, 40, 40),
    (3, 2, 6, 40, 80),
    (3, 1, 6, 80, 80),
    (3, 1, 6, 80, 80),
    (5, 1, 6, 80, 112),
    (5, 1, 6, 112, 112),
    (5, 1, 6, 112, 112),
    (5, 2, 6, 112, 192),
    (5, 1, 6, 192, 192),
    (5, 1, 6, 192, 192),
    (5, 1, 6, 192, 192),
    (3, 1, 6, 192, 320),
]


def published_weights() -> dict[str, torch.Tensor]:
    """Random weights by the published names and shapes."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}

    def add(convolution: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        spread = (inputs * kernel * kernel) ** -0.5
        shape = (outputs, inputs, kernel, kernel)
        weights[f"{convolution}.weight"] = torch.randn(shape, generator=generator) * 1.5 * spread
        weights[f"{norm}.weight"] = 0.5 + torch.rand(outputs, generator=generator)
        weights[f"{norm}.bias"] = torch.randn(outputs, generator=generator) * 0.3
        weights[f"{norm}.running_mean"] = torch.randn(outputs, generator=generator) * 0.1
        weights[f"{norm}.running_var"] = 0.5 + torch.rand(outputs, generator=generator)
        weights[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    add("_conv_stem", "_bn0", 32, 3, 3)
    for i, (kernel, _, expansion, inputs, outputs) in enumerate(BLOCKS):
        wide = inputs * expansion
        if expansion > 1:
            add(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", wide, inputs, 1)
        add(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", wide, 1, kernel)
        add(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", outputs, wide, 1)
    add("_conv_head", "_bn1", 1280, 320, 1)
    weights["_fc.weight"] = torch.zeros(1000, 1280)
    weights["_fc.bias"] = torch.zeros(1000)
    return weights
