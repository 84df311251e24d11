"""Weights and scores as numbers for people, whatever their size.

Vectors of length 1 have weights of a few hundredths, and products of those are smaller still: with
two decimals for everything they would all read 0.00.
"""

from __future__ import annotations

import math

__all__ = ["decimals_for"]

MOST_DECIMALS = 9


def decimals_for(largest: float, *, usual: int) -> int:
    """Decimals with which numbers up to `largest` are written.

    Args:
        largest: The largest of the numbers that stand together.
        usual: Decimals where that gives the largest one three digits or more that tell something.
    """
    if not (0 < largest < math.inf):
        return usual
    needed = 2 - math.floor(math.log10(largest))
    return min(max(usual, needed), MOST_DECIMALS)
