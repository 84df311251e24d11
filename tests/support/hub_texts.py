"""Texts that models of the hub are compared on, and rows as arrays."""

from __future__ import annotations

import numpy as np

TEXTS = [
    "the cat paints a blue book",
    "dog",
    "theory of light, running!",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z of the sea and the sun",
    "blue waves",
]


def dense(rows) -> np.ndarray:
    return rows.to_scipy().toarray()
