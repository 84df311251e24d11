"""How well texts find their images and images their texts, on pairs held out of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vdr_db.encoders.cross_modal import CrossModalEncoder
from vdr_db.encoders.selection import to_sparse_rows
from vdr_db.sparse import SparseRows
from vdr_db.training.images.data import Pair
from vdr_db.training.images.vectors import ImageSide, TextSide
from vdr_db.training.images.views import PairImages

__all__ = ["CUTOFFS", "HeldOutPairs", "ranks", "recalls"]

CUTOFFS = (1, 5, 10)
BATCH = 64


def ranks(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """Place of each row's own column when the row is sorted, from 1.

    Of equal scores the earlier column comes first, as in the stores. A score of 0 means that
    nothing is shared, and finds nothing: such a row's rank is its number of columns.

    Args:
        scores: `[N, N]`; row i belongs to column i.
    """
    own = np.diagonal(scores)[:, None]
    columns = np.arange(len(scores))
    before = (scores > own) | ((scores == own) & (columns < columns[:, None]))
    places: npt.NDArray[np.int64] = 1 + before.sum(axis=1)
    return np.where(own[:, 0] == 0, len(scores), places)


def recalls(
    scores: npt.NDArray[np.floating], stored: npt.NDArray[np.floating] | None = None
) -> dict[str, float]:
    """R@1, R@5 and R@10 of texts looking for images and the other way, and nDCG@10.

    Each text has one image and each image one text, so nDCG@10 of a row is 1 / log2(1 + rank)
    within the first ten, else 0; `ndcg@10` is the mean of both directions.

    Args:
        scores: `[N, N]`, texts in rows, images in columns.
        stored: The same of texts as a collection stores them, for images that look for texts; None
            where texts have one vector.
    """
    found = {}
    gains = []
    backwards = scores if stored is None else stored
    for name, matrix in (("text_to_image", scores), ("image_to_text", backwards.T)):
        places = ranks(matrix)
        for cutoff in CUTOFFS:
            found[f"{name}_r@{cutoff}"] = float((places <= cutoff).mean())
        gains.append(np.where(places <= 10, 1 / np.log2(1 + places), 0.0).mean())
    return {"ndcg@10": float(np.mean(gains)), **found}


class HeldOutPairs:
    """Pairs that a run is measured on.

    Attributes:
        texts: The last text of each pair, the fullest by convention.
        images: Their images.
    """

    def __init__(self, pairs: Sequence[Pair], images: PairImages) -> None:
        """Takes them over."""
        self.texts = [pair.texts[-1] for pair in pairs]
        self.images = images

    def measure(self, encoder: CrossModalEncoder, side: ImageSide) -> dict[str, float]:
        """Recalls of sparse vectors, and how many words an image keeps."""
        rows = self.rows(encoder, side)
        sides = encoder.encode_queries(self.texts), encoder.encode_documents(self.texts)
        found = recalls(*(side.dot(rows) for side in sides))
        return {**found, "image_nonzeros": float(rows.counts.mean())}

    def measure_dense(self, texts: TextSide, side: ImageSide) -> dict[str, float]:
        """Recalls of the dense baseline's vectors."""
        with torch.no_grad():
            parts = [texts.encode(self.texts[i : i + BATCH], {"cls"}).cls for i in self._starts()]
            images = [side.encode(inputs).cls for inputs in self._inputs()]
        left = torch.cat([part for part in parts if part is not None])
        right = torch.cat([part for part in images if part is not None])
        return recalls((left @ right.T).double().cpu().numpy())

    @torch.no_grad()
    def rows(self, encoder: CrossModalEncoder, side: ImageSide) -> SparseRows:
        """Vectors of the images as the encoder would store them."""
        image = encoder.image
        parts = [
            to_sparse_rows(
                side.logits(side.states(inputs)),
                image.vocabulary,
                k=image.k,
                activation=image.activation,
                norm=image.norm,
                backend=image.backend,
            )
            for inputs in self._inputs()
        ]
        return SparseRows.concat(parts)

    def _starts(self) -> range:
        return range(0, len(self.texts), BATCH)

    def _inputs(self) -> Iterator[Tensor]:
        for start in self._starts():
            numbers = range(start, min(start + BATCH, len(self.texts)))
            yield self.images.take(numbers, [0] * len(numbers))
