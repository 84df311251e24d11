"""Named shapes of ragged batches; lengths are drawn once, from a fixed seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

V_BERT = 30_522


@dataclass(frozen=True)
class Shape:
    """One batch for one model.

    Attributes:
        name: As in the result tables.
        lengths: Tokens of each text.
        H: Hidden size.
        V: Vocabulary columns.
    """

    name: str
    lengths: tuple[int, ...]
    H: int
    V: int = V_BERT

    @property
    def T(self) -> int:
        """Tokens of the batch."""
        return sum(self.lengths)

    @property
    def flop(self) -> int:
        """Floating point operations of the projection of the real tokens."""
        return 2 * self.T * self.H * self.V

    def __str__(self) -> str:
        """Sizes, as in the result tables."""
        B, L = len(self.lengths), max(self.lengths)
        return f"{self.name} B={B} L<={L} T={self.T} H={self.H} V={self.V}"


def mixed(texts: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths drawn evenly between two bounds, in no order; the longest is always there."""
    draw = random.Random(0)
    return (longest, *(draw.randint(shortest, longest) for _ in range(texts - 1)))


HEAD_CPU = (
    Shape("base", mixed(16, 16, 128), 768),
    Shape("base full", (128,) * 16, 768),
    Shape("base long", (512,) * 2, 768),
    Shape("minilm", mixed(16, 16, 128), 384),
    Shape("tiny", mixed(16, 16, 128), 128),
    Shape("queries", mixed(64, 3, 16), 768),
    Shape("one query", (8,), 768),
    Shape("one tiny query", (8,), 128),
    Shape("one token", (1,), 768),
)
