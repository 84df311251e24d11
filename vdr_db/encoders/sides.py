"""Sides of a text encoder that are more, or less, than a tower: static weights and gates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vdr_db.checkpoints.plan import Entry
from vdr_db.checkpoints.sides import TextTower
from vdr_db.encoders.batching import Frame, PackedBatch
from vdr_db.sparse import SparseRows
from vdr_db.text.tokenization import TextTokenizer, TokenizedTexts
from vdr_db.towers.static import StaticTower
from vdr_db.warning import warn_caller

if TYPE_CHECKING:
    from vdr_db.encoders.base import Bar
    from vdr_db.kernels import Activation

__all__ = ["TextSide", "gated_rows", "in_order", "static_rows", "warn_of_cuts"]


@dataclass(frozen=True)
class TextSide:
    """What makes vectors of the texts of one side.

    Attributes:
        tower: A model, or static weights.
        entry: Maximal length, k and prompt.
        tokenizer: Of its texts.
        activation: Turns scores into weights.
        gate: Static weights that vectors are multiplied with, or None.
    """

    tower: TextTower
    entry: Entry
    tokenizer: TextTokenizer
    activation: Activation
    gate: StaticTower | None = None

    @property
    def static(self) -> StaticTower | None:
        """The static weights, or None where a model runs."""
        tower: object = self.tower
        return tower if isinstance(tower, StaticTower) else None

    @property
    def extra_length(self) -> int:
        """Special tokens around a text; static weights know none."""
        return 0 if self.static else self.tokenizer.extra_length

    def checked_entry(self, columns: int) -> Entry:
        """The entry with a maximal length that is a number.

        Args:
            columns: Dimensions the model computes.

        Raises:
            ConfigError: `k` or the maximal length is impossible for this side.
        """
        most = self.tower.config.max_length
        return self.entry.checked(columns=columns, positions=most, special=self.extra_length)

    def encode(self, texts: Sequence[str]) -> TokenizedTexts:
        """Own tokens of each text, of long ones at least those kept and one more.

        Special tokens in a text are text to static weights.
        """
        as_text = True if self.static else None
        return self.tokenizer.encode(texts, special_as_text=as_text, most=self.frame().own)

    def frame(self) -> Frame:
        """What stands around a text, and its length."""
        config = self.tower.config
        return Frame(
            prefix=() if self.static else self.tokenizer.prefix_ids,
            suffix=() if self.static else self.tokenizer.suffix_ids,
            pad_id=config.pad_id,
            first_position=config.first_position,
            counts_from_pad=config.first_position > 0,
            max_length=self.entry.max_length or config.max_length,
            cuts_left=self.tokenizer.cuts_left,
        )


def warn_of_cuts(count: int, max_length: int) -> None:
    """Says that texts were cut."""
    warn_caller(
        f"{count} texts are longer than {max_length} tokens and were cut; this is said once, "
        "`encoder.truncated` keeps the count. Add long texts with passages=True, or raise "
        "`max_length` if the model allows."
    )


def static_rows(
    tower: StaticTower,
    tokens: TokenizedTexts,
    is_empty: npt.NDArray[np.bool_],
    frame: Frame,
    k: int | None,
) -> SparseRows:
    """Vectors of texts by static weights.

    Args:
        tower: The weights.
        tokens: The texts with their prompts.
        is_empty: `[N]`, whether a text has no token of its own: it gets an empty row.
        frame: Its length.
        k: Dimensions kept, or None for all.
    """
    chosen = np.flatnonzero(~is_empty)
    rows = tower.rows_of(tokens.cut(chosen, frame.own, left=frame.cuts_left))
    rows = rows if k is None else rows.topk(k)
    order = np.argsort(np.concatenate([chosen, np.flatnonzero(is_empty)]))
    parts = [rows, SparseRows.empty(int(is_empty.sum()), rows.shape[1])]
    return SparseRows.concat(parts)[order]


def in_order(
    found: Iterable[tuple[PackedBatch, SparseRows]],
    empty: npt.NDArray[np.int64],
    width: int,
    bar: Bar,
) -> SparseRows:
    """Rows of batches in the order of their texts.

    Args:
        found: Batches with their rows.
        empty: Numbers of the texts that are in none: they get empty rows.
        width: Of a row.
        bar: Counts texts.
    """
    bar.update(empty.size)
    parts, order = [SparseRows.empty(empty.size, width)], [empty]
    for batch, rows in found:
        parts.append(rows)
        order.append(batch.texts)
        bar.update(len(batch.texts))
    texts = np.concatenate(order)
    joined = SparseRows.concat([part for part in parts if len(part)] or parts)
    return joined if texts.size <= 1 else joined[np.argsort(texts)]


def gated_rows(way: TextSide, rows: SparseRows, tokens: TokenizedTexts) -> SparseRows:
    """Vectors of texts times the static weights of their tokens.

    Args:
        way: Of the texts, with a gate.
        rows: One for each text, before any choice of dimensions.
        tokens: The texts with their prompts.
    """
    assert way.gate is not None
    frame, k = way.frame(), way.entry.k
    cut = tokens.cut(np.arange(len(rows)), frame.own, left=frame.cuts_left)
    framed = [
        [*frame.prefix, *cut.input_ids[a:b].tolist(), *frame.suffix]
        for a, b in pairwise(cut.cu_seqlens)
    ]
    bounds = np.concatenate([[0], np.cumsum([len(ids) for ids in framed])]).astype(np.int64)
    ids = np.array([id for text in framed for id in text], np.int32)
    found = way.gate.gated(rows, TokenizedTexts(ids, bounds))
    return found if k is None else found.topk(k)
