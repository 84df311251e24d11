"""What encoders and explanations ask of a tower, whichever runtime computes it.

A tower is a body and its head. Whatever else its runtime can do, such as training or batches on a
GPU, these few things need nothing but NumPy arrays:

    weight of column v at position p = activation(states(item)[p] . rows([v])[0] + bias([v])[0])

and the weight of an item is the largest over its positions.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from vdr_db.towers.families import BodyConfig
from vdr_db.towers.packing import TextItem

__all__ = [
    "LIBRARIES",
    "FloatArray",
    "GraphRuntime",
    "ImageSizes",
    "ImageTowerLike",
    "Precision",
    "TextTowerLike",
    "TowerLike",
]

FloatArray: TypeAlias = npt.NDArray[np.float32]
Precision: TypeAlias = Literal["float32", "bfloat16", "int8"]
"""Of the products in a body. Scores of columns that are kept are float32 in any case."""
GraphRuntime: TypeAlias = Literal["onnx", "openvino"]
"""What computes the graph of a body."""
LIBRARIES: dict[GraphRuntime, str] = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
"""How messages call them."""
Config_co = TypeVar("Config_co", covariant=True)
Item_contra = TypeVar("Item_contra", contravariant=True)


class ImageSizes(Protocol):
    """What is known of an image body without its weights; every `ImageBody` is one."""

    @property
    def image_size(self) -> int:
        """Side of the square it reads, in pixels."""

    @property
    def patches(self) -> int:
        """Number P of patches of an image, in rows from the top."""

    @property
    def hidden_size(self) -> int:
        """Width H of a patch's state."""


class TowerLike(Protocol[Config_co, Item_contra]):
    """A body and its head, by what can be asked of both without torch."""

    @property
    def config(self) -> Config_co:
        """Sizes and constants of the body."""

    @property
    def head_name(self) -> str:
        """Name of the head in stamps and files: `"vdr"`, `"mlm"`, `"mean"`, `"image"`."""

    @property
    def columns(self) -> int:
        """Number V of columns of the vocabulary matrix."""

    def states(self, item: Item_contra) -> FloatArray:
        """Hidden states of one item after the head's transform, as the vocabulary matrix wants.

        Computed as in encoding: without dropout, without gradients, in the tower's own dtype.

        Returns:
            `[P, H]` float32, one row for each position the tower reads: for a text its tokens,
            special ones and padding included, for an image its patches in rows from the top. A
            head of the mean has one row for the whole text.
        """

    def pooled(self, item: Item_contra) -> FloatArray:
        """Largest score of each column over the positions of one item.

        Returns:
            `[V]` float32, before activation.
        """

    def rows(self, columns: npt.NDArray[np.int64]) -> FloatArray:
        """Rows of the vocabulary matrix.

        Args:
            columns: `[D]` columns of the vocabulary (not token ids).

        Returns:
            `[D, H]` float32, a copy.
        """

    def bias(self, columns: npt.NDArray[np.int64]) -> FloatArray | None:
        """What is added to the scores of some columns, `[D]` float32; None where nothing is.

        Args:
            columns: `[D]` columns of the vocabulary.
        """


TextTowerLike: TypeAlias = TowerLike[BodyConfig, TextItem]
ImageTowerLike: TypeAlias = TowerLike[ImageSizes, FloatArray]
"""Its item is `[3, S, S]` float32, preprocessed pixels."""
