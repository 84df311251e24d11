"""The most that is read of one line or tokenizer; budgets of images and of `serve` stand there."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BUDGET", "Budget"]


@dataclass(frozen=True)
class Budget:
    """The most that is read of what others wrote; the defaults fit a small server.

    Attributes:
        line_characters: Of a line of a text file, unpacked: a line of 3.5 GB packs into 3.5 MB.
        vocabulary_ids: Token ids of a tokenizer, the largest plus one; vectors are as wide.
    """

    line_characters: int = 1 << 24
    vocabulary_ids: int = 1 << 22


BUDGET = Budget()
"""The budget where none is passed."""
