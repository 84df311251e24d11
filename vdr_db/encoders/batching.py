"""From token ids to packed batches, and what makes a vector depend on its text alone.

A batch is a `[T]` row of tokens: the texts one after the other, each with its special tokens,
longest first, so that texts of equal length stand together. Nothing is padded, with one exception
at the end of the row (`ROW_MULTIPLE`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vdr_db.checkpoints.plan import Compatibility
from vdr_db.encoders.base import positive
from vdr_db.text.tokenization import TokenizedTexts
from vdr_db.towers.packing import ROW_MULTIPLE, Run, TextItem

__all__ = [
    "ROW_MULTIPLE",
    "Frame",
    "PackedBatch",
    "checked_budget",
    "pack",
    "packed_batches",
    "plan_batches",
    "plan_texts",
    "upstream_batches",
]

IntArray = npt.NDArray[np.int64]

TOKEN_BUDGET = {"cpu": 4096}
"""Tokens in a batch, by device type. On the CPU the head reaches its full rate from about 1,000
tokens on, and the widest layer of BERT-base takes 12 KB a token."""
TOKEN_BUDGET_ELSEWHERE = 32768

POOLED_BYTES = 1 << 26
"""Most bytes of the pooled scores `[B, V]` of a batch: 64 MB, 549 texts of BERT's vocabulary."""


def checked_budget(asked: int | None, device: str) -> int:
    """Most tokens in a batch.

    Args:
        asked: What the caller wants; None for what suits the device.
        device: The device, such as `"cuda:0"`.

    Raises:
        ConfigError: It is no integer, or below 1.
    """
    budget = TOKEN_BUDGET.get(device.partition(":")[0], TOKEN_BUDGET_ELSEWHERE)
    return positive("token_budget", budget if asked is None else asked)


@dataclass(frozen=True)
class Frame:
    """What stands around a text's own tokens.

    Attributes:
        prefix: Ids before it.
        suffix: Ids after it.
        pad_id: Id of padding.
        first_position: Position number of the first token.
        counts_from_pad: Whether `pad_id` tokens get no position of their own (RoBERTa).
        max_length: Most tokens of a text, prefix and suffix included.
        cuts_left: Whether a longer text loses its first tokens, not its last.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad_id: int
    first_position: int
    counts_from_pad: bool
    max_length: int
    cuts_left: bool = False

    @property
    def own(self) -> int:
        """Most tokens of a text without prefix and suffix."""
        return self.max_length - len(self.prefix) - len(self.suffix)


@dataclass(frozen=True)
class PackedBatch:
    """Texts one after the other, ready for a body.

    Attributes:
        texts: `[B]` numbers of the texts, in packed order.
        input_ids: `[T]` int64; T is a multiple of `ROW_MULTIPLE`.
        position_ids: `[T]` int64.
        cu_seqlens: `[B + 1]` int32, or `[B + 2]` with a last text of padding that fills up T.
        runs: Texts of equal length, in packed order.
    """

    texts: IntArray
    input_ids: IntArray
    position_ids: IntArray
    cu_seqlens: npt.NDArray[np.int32]
    runs: tuple[Run, ...]

    def item(self, place: int) -> TextItem:
        """One text of the batch by its place in packed order, as a tower reads it alone."""
        start, stop = (int(bound) for bound in self.cu_seqlens[place : place + 2])
        run = next(run for run in self.runs if run.start <= start < run.stop)
        return TextItem(self.input_ids[start:stop], self.position_ids[start:stop], run.kept)


def plan_batches(lengths: IntArray, *, tokens: int, rows: int) -> list[IntArray]:
    """Texts in batches of similar length, longest first.

    Args:
        lengths: `[N]` tokens of each text.
        tokens: Most tokens in a batch; a longer text stands alone.
        rows: Most texts in a batch.

    Returns:
        Numbers of the texts in each batch; every number once.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[IntArray] = []
    start = total = 0
    for i, length in enumerate(lengths[order].tolist()):
        if i > start and (total + length > tokens or i - start >= rows):
            batches.append(order[start:i])
            start, total = i, 0
        total += length
    if order.size > start:
        batches.append(order[start:])
    return batches


def upstream_batches(lengths: IntArray, size: int) -> list[IntArray]:
    """Texts in batches of `size` in the given order, as the published VDR code makes them."""
    return [np.arange(i, min(i + size, lengths.size)) for i in range(0, lengths.size, size)]


def plan_texts(
    lengths: IntArray,
    frame: Frame,
    compatibility: Compatibility | None,
    *,
    is_empty: npt.NDArray[np.bool_],
    tokens: int,
    rows: int,
) -> tuple[list[IntArray], IntArray]:
    """Batches of texts, and the texts that need none because they get an empty row.

    Args:
        lengths: `[N]` own tokens of each text, its prompt's included.
        frame: What stands around each.
        compatibility: How the published code pads, or None for no padding.
        is_empty: `[N]`, whether a text has no token of its own.
        tokens: Most tokens in a batch; a longer text stands alone.
        rows: Most texts in a batch.

    Returns:
        Numbers of the texts of each batch, and numbers of the empty ones.
    """
    none = np.zeros(0, np.int64)
    if compatibility is not None and compatibility.padded_to == "longest":
        return upstream_batches(lengths, compatibility.batch_size), none
    if compatibility is not None:
        cost = np.full_like(lengths, frame.max_length)
        return plan_batches(cost, tokens=tokens, rows=rows), none
    full = np.flatnonzero(~is_empty)
    cost = np.minimum(lengths[full], frame.own) + frame.max_length - frame.own
    batches = plan_batches(cost, tokens=tokens, rows=rows)
    return [full[batch] for batch in batches], np.flatnonzero(is_empty)


def packed_batches(
    texts: TokenizedTexts,
    batches: list[IntArray],
    frame: Frame,
    compatibility: Compatibility | None,
) -> Iterator[PackedBatch]:
    """Planned batches, each made when it is asked for; see `plan_texts`."""
    padded_to = None if compatibility is None else frame.max_length
    for chosen in batches:
        if compatibility is not None and compatibility.padded_to == "longest":
            own = np.minimum(texts.lengths[chosen], frame.own)
            padded_to = int(own.max()) + frame.max_length - frame.own
        yield pack(texts, chosen, frame, padded_to=padded_to)


def pack(
    texts: TokenizedTexts,
    chosen: IntArray,
    frame: Frame,
    *,
    padded_to: int | None = None,
) -> PackedBatch:
    """One batch.

    Args:
        texts: Own tokens of all texts.
        chosen: `[B]` numbers of the texts of this batch.
        frame: What stands around each; own tokens beyond `frame.own` are cut.
        padded_to: Fill every text with padding up to this length, and let padding count as the
            text's own positions. For comparison with vectors that were made that way only.

    Returns:
        The batch. Rows that only fill up T are one more text at its end.
    """
    own = np.minimum(texts.lengths[chosen], frame.own)
    kept = own + len(frame.prefix) + len(frame.suffix)
    rows = kept if padded_to is None else np.full_like(kept, kept.max(initial=padded_to))
    order = np.argsort(-kept, kind="stable")
    chosen, own, kept, rows = chosen[order], own[order], kept[order], rows[order]
    used = int(rows.sum())
    rest = -used % ROW_MULTIPLE
    ids = np.full(used + rest, frame.pad_id, np.int64)
    positions = np.full(used + rest, frame.first_position, np.int64)
    starts = np.concatenate([[0], np.cumsum(rows)])
    source_of = texts.cu_seqlens
    for text, count, start, length in zip(
        chosen.tolist(), own.tolist(), starts.tolist(), rows.tolist(), strict=False
    ):
        source = int(source_of[text + 1]) - count if frame.cuts_left else int(source_of[text])
        inside = start + len(frame.prefix)
        ids[start:inside] = frame.prefix
        ids[inside : inside + count] = texts.input_ids[source : source + count]
        stop = inside + count + len(frame.suffix)
        ids[inside + count : stop] = frame.suffix
        positions[start : start + length] = _positions(ids[start : start + length], frame)
    bounds = starts if not rest else np.append(starts, used + rest)
    runs = [*_runs(rows, kept)]
    if rest:
        runs.append(Run(start=used, count=1, length=rest, kept=rest))
    return PackedBatch(chosen, ids, positions, bounds.astype(np.int32), tuple(runs))


def _positions(ids: IntArray, frame: Frame) -> IntArray:
    if not frame.counts_from_pad:
        return np.arange(frame.first_position, frame.first_position + ids.size)
    counted = ids != frame.pad_id
    return np.where(counted, np.cumsum(counted) + frame.pad_id, frame.pad_id)


def _runs(rows: IntArray, kept: IntArray) -> Iterator[Run]:
    start = first = 0
    for i in range(1, rows.size + 1):
        if i == rows.size or rows[i] != rows[first] or kept[i] != kept[first]:
            yield Run(start=start, count=i - first, length=int(rows[first]), kept=int(kept[first]))
            start += (i - first) * int(rows[first])
            first = i
