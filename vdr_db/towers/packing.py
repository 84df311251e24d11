"""How items of a batch stand one after the other in packed rows; nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ROW_MULTIPLE", "Run", "TextItem"]

ROW_MULTIPLE = 16
"""Packed rows come in multiples of this.

A float32 matrix product on the CPU sums along its inner axis in one fixed order for every row, as
long as its rows fill the tiles of the library's inner loop. The last 1 to 3 rows of a thread's
share do not, and get other bits. With whole multiples of 16 rows there is no such rest, whatever
the number of texts (measured: see ADR 0004). The rest is filled with a text of padding that is
thrown away.
"""


@dataclass(frozen=True)
class Run:
    """Texts of equal length that stand next to each other in the packed rows.

    Attributes:
        start: First packed row.
        count: Number of texts.
        length: Rows of each text, at least 1.
        kept: Rows of each text that others may attend to, at most `length`; the rest is padding.
    """

    start: int
    count: int
    length: int
    kept: int

    @property
    def stop(self) -> int:
        """One past the last packed row."""
        return self.start + self.count * self.length


@dataclass(frozen=True)
class TextItem:
    """One text as a tower reads it, with its special tokens.

    Attributes:
        input_ids: `[P]` int64.
        position_ids: `[P]` int64.
        kept: Positions that others may attend to, the first ones; the rest is padding.
    """

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    kept: int
