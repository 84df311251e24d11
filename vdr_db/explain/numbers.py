"""Weights and scores as numbers for people, whatever their size.

Vectors of length 1 have weights of a few hundredths, and products of those are smaller still: with
two decimals for everything they would all read 0.00.
"""

from __future__ import annotations

import math

__all__ = ["decimals_for"]

MOST_DECIMALS = 9


def decimals_for(largest: float, *, usual: int) -> int:
    """Decimals of numbers that stand together: the largest has three digits that tell something."""
    if not (0 < largest < math.inf):
        return usual
    return min(max(usual, 2 - math.floor(math.log10(largest))), MOST_DECIMALS)
