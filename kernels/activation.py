"""Activations of pooled logits: increasing functions with values of at least 0, or the identity.

Being increasing, they commute with the max over tokens, so they are applied to what is kept after
pooling and selection: `[nnz]` values instead of `[T, V]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdr_db.errors import ConfigError, ShapeError
from vdr_db.kernels.names import ACTIVATIONS, Activation

__all__ = ["ACTIVATIONS", "Activation", "activate", "check_activation"]


def activate(logits: Tensor, activation: Activation) -> Tensor:
    """Weights of logits, element by element; NaN stays NaN.

    `elu1p` is x + 1 where x >= 0, else exp(x): never 0 before exp underflows (below -103 in
    float32), where `elu(x) + 1` rounds to 0 from -17 on. `log1p_relu` is log(1 + max(x, 0)),
    `double_log1p_relu` is log(1 + log(1 + max(x, 0))), `none` is x itself.

    Args:
        logits: Any shape, any float dtype.
        activation: One of `ACTIVATIONS`.

    Returns:
        Weights, same shape and dtype.

    Raises:
        ConfigError: `activation` is not one of them.
        ShapeError: `logits` are of no float dtype.

    Source: elu1p: Zhou et al., Retrieval-based Disentangled Representation Learning (VDR), 2024;
    log1p_relu: Formal et al., SPLADE, 2021.
    """
    check_activation(activation)
    if not logits.is_floating_point():
        raise ShapeError(f"`logits` must be of a float dtype, got {logits.dtype}; convert them.")
    if activation == "elu1p":
        # The clamp keeps the branch not taken finite, so that its zero gradient stays zero.
        return torch.where(logits < 0, logits.clamp(max=0).exp(), logits + 1)
    if activation == "log1p_relu":
        return logits.relu().log1p()
    if activation == "double_log1p_relu":
        return logits.relu().log1p().log1p()
    return logits


def check_activation(activation: str) -> None:
    """Refuses an unknown activation.

    Raises:
        ConfigError: `activation` is not one of `ACTIVATIONS`.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"`activation` must be one of {ACTIVATIONS}, got {activation!r}.")
