"""Where a weight comes from: which token of a text, or which patch of an image, fires it.

A weight is the largest over all positions, so each dimension has one position it comes from; under
a head of the mean that is a position of its own, for the whole text. Only the dimensions a vector
keeps are computed here, `[P, D]` for P positions; never `[P, V]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from vdr_db.errors import ShapeError
from vdr_db.explain.own import own_part
from vdr_db.explain.spans import NOWHERE, Span, token_spans
from vdr_db.kernels.plain import activate
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.kernels import Activation

__all__ = ["Attribution", "heaviest", "text_attribution", "weights_by_position"]

MOST_DIMENSIONS = 256
"""Dimensions that are followed back to their positions, the heaviest of a vector."""

LEAST_SHARE = 0.25
"""Of the largest weight: a patch with less than this is not named."""

PADDING = "padding"
"""Name of the position that stands for all padding, in the compatibility mode that pools it."""

WHOLE = "the whole text"
"""Name of the position that stands for a text where the head reads the mean of its states."""


@dataclass(frozen=True)
class Attribution:
    """Weights of each position alone.

    Attributes:
        positions: Name of each position: the token, or `"row,column"` of a patch.
        ids: `[D]` int32 token ids, the heaviest of the vector first.
        weights: `[P, D]` float32, the weight each position alone would give; the largest of a
            column is the weight in the vector.
        spans: Characters of the text each position stands for, or empty for an image.
        grid: Rows and columns of patches, or None for a text.

    Raises:
        ShapeError: The sizes disagree.
    """

    positions: tuple[str, ...]
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    spans: tuple[Span, ...] = ()
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        expected = (len(self.positions), int(self.ids.size))
        if self.weights.shape != expected:
            raise ShapeError(
                f"`weights` must be [positions, ids] = {list(expected)}, got "
                f"{list(self.weights.shape)}; take the rows of one text or image only."
            )
        if self.spans and len(self.spans) != len(self.positions):
            raise ShapeError(
                f"`spans` must name a place for each of the {len(self.positions)} positions, got "
                f"{len(self.spans)}; leave it out for an image."
            )
        if self.grid is not None and self.grid[0] * self.grid[1] != len(self.positions):
            raise ShapeError(
                f"`grid` must have {len(self.positions)} patches, got {self.grid[0]} rows of "
                f"{self.grid[1]}; leave out the class token."
            )

    @classmethod
    def of_patches(
        cls, weights: npt.ArrayLike, ids: npt.ArrayLike, grid: tuple[int, int]
    ) -> Attribution:
        """Attribution of an image, of weights `[rows * columns, D]` by patch, row by row.

        Raises:
            ShapeError: The sizes disagree.
        """
        rows, columns = grid
        names = tuple(f"{row},{column}" for row in range(rows) for column in range(columns))
        return cls(names, np.asarray(ids, np.int32), np.asarray(weights, np.float32), grid=grid)

    @property
    def best(self) -> npt.NDArray[np.int64]:
        """`[D]` position each weight comes from; the first of equal ones."""
        if not self.positions:
            return np.zeros(0, np.int64)
        return np.argmax(self.weights, axis=0).astype(np.int64, copy=False)  # type: ignore[no-any-return]

    def fired(self, position: int) -> list[tuple[int, float]]:
        """Token ids whose weight comes from a position, with their weights, heaviest first."""
        columns = np.flatnonzero(self.best == position)
        return [(int(self.ids[d]), float(self.weights[position, d])) for d in columns]

    def strongest(self, *, least: float = LEAST_SHARE) -> dict[int, tuple[int, float]]:
        """Position -> the token id with the most weight there, and that weight.

        Unlike `fired`, this also names positions where another one gives the same word more.
        Weights below a share `least` of the largest one are left out.
        """
        if not self.ids.size or not self.positions:
            return {}
        columns = np.argmax(self.weights, axis=1)
        weights = self.weights[np.arange(len(self.positions)), columns]
        bound = least * float(weights.max())
        return {
            p: (int(self.ids[d]), float(weight))
            for p, (d, weight) in enumerate(zip(columns.tolist(), weights.tolist(), strict=True))
            if weight > 0 and weight >= bound
        }

    @property
    def totals(self) -> npt.NDArray[np.float64]:
        """`[P]` sum of the weights that come from each position."""
        largest = self.weights.max(axis=0, initial=0.0).tolist()
        return self.totals_of(dict(zip(self.ids.tolist(), largest, strict=True)))

    def totals_of(self, shares: Mapping[int, float]) -> npt.NDArray[np.float64]:
        """`[P]` sum of what the words that come from each position count.

        Args:
            shares: Token id -> how much it counts, such as its share of a score.
        """
        counted = np.array([shares.get(int(id), 0.0) for id in self.ids], np.float64)
        return np.bincount(self.best, weights=counted, minlength=len(self.positions)).astype(
            np.float64
        )


def weights_by_position(
    states: npt.NDArray[np.float32],
    rows: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32] | None,
    activation: Activation,
) -> npt.NDArray[np.float32]:
    """The weight each position alone would give each of some columns.

    Args:
        states: `[P, H]`, as the vocabulary matrix wants them.
        rows: `[D, H]`, rows of the vocabulary matrix.
        bias: `[D]` or None.
        activation: Of the encoder.

    Returns:
        `[P, D]` float32, before any norm.
    """
    logits: npt.NDArray[np.float32] = states @ rows.T if bias is None else states @ rows.T + bias
    return activate(logits, activation)


def text_attribution(
    encoder: SparseEncoder,
    text: str,
    *,
    side: Literal["document", "query"] = "document",
    row: SparseRows | None = None,
    most: int = MOST_DIMENSIONS,
) -> Attribution:
    """Which token of a text fires which word.

    Its vector is made unless the `row` is there already; the `most` heaviest dimensions are
    followed back. Positions are the special tokens and the text's own ones, as far as the model
    reads. Own weights stand with their own words, wherever the model's weight of the same dimension
    comes from: the largest of a column may then be less than their sum, the weight in the vector.

    Raises:
        ShapeError: `row` is not one row.
    """
    if row is None:
        encode = encoder.encode_documents if side == "document" else encoder.encode_queries
        row = encode([text])
    if len(row) != 1:
        raise ShapeError(f"`row` must be one row, got {len(row)}; pass the vector of this text.")
    column_of = encoder.vocabulary.id_to_column
    ids = heaviest(row, len(row.indices))
    ids = ids[column_of[ids] >= 0][:most]
    way = encoder.side(side)
    tower = way.tower
    names, spans = _positions(encoder, way.entry.prompt, text, side)
    columns = column_of[ids].astype(np.int64)
    item = encoder.item(side, text)
    weights = weights_by_position(
        tower.states(item), tower.rows(columns), tower.bias(columns), way.activation
    )
    own = own_part(encoder, text, side, row)
    if tower.head_name == "mean":  # no word of the model comes from one place
        names, spans = [*names, WHOLE], [*spans, NOWHERE]
        weights = np.pad(weights, ((len(names) - 1, 0), (0, 0)))
    if own and encoder.own_weights is not None:
        standing = encoder.own_weights.canon[item.input_ids]
        for d, id in enumerate(ids.tolist()):
            weights[: len(standing)][standing == id, d] += own.get(id, 0.0)
    if weights.shape[0] > len(names):
        padding = weights[len(names) :].max(axis=0, keepdims=True)
        weights = np.concatenate([weights[: len(names)], padding])
        names, spans = [*names, PADDING], [*spans, NOWHERE]
    if encoder.norm and ids.size:
        weights = weights * np.float32(row.to_dicts()[0][int(ids[0])] / weights[:, 0].max())
    return Attribution(tuple(names), ids, weights, tuple(spans))


def _positions(
    encoder: SparseEncoder, prompt: str, text: str, side: Literal["document", "query"]
) -> tuple[list[str], list[Span]]:
    """Names and places of everything the model reads."""
    frame = encoder.frame(side)
    own, spans = token_spans(encoder, prompt + text)
    kept = slice(-frame.own, None) if frame.cuts_left else slice(frame.own)
    own, spans = own[kept], spans[kept]
    shift = len(prompt)
    moved = [(a - shift, b - shift) if a >= shift else NOWHERE for a, b in spans]
    token = encoder.vocabulary.token
    names = [token(id) for id in (*frame.prefix, *own, *frame.suffix)]
    return names, [*[NOWHERE] * len(frame.prefix), *moved, *[NOWHERE] * len(frame.suffix)]


def heaviest(row: SparseRows, most: int) -> npt.NDArray[np.int32]:
    """Token ids of one row, heaviest first."""
    ids, weights = row.row(0)
    return ids[np.lexsort((ids, -weights))[:most]].astype(np.int32)
