"""Names of activations and of backends, for those who plan and check without torch."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

__all__ = ["ACTIVATIONS", "BACKENDS", "Activation", "Backend"]

Activation: TypeAlias = Literal["elu1p", "log1p_relu", "double_log1p_relu", "none"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

Backend: TypeAlias = Literal["auto", "reference", "cpu", "cpu-int8", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
