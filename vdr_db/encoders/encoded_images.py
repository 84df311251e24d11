"""What encoding images gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vdr_db.sparse import SparseRows

__all__ = ["EncodedImages"]


@dataclass(frozen=True)
class EncodedImages:
    """Vectors of images, and the images that have none.

    Attributes:
        rows: One row for each image, in order; that of a refused image is empty.
        names: Path of each image (within the folder, for a folder), or `"image N"`.
        digests: SHA-256 (hex) of the content of each image; `""` of a refused one.
        refused: Place of each image that could not be read → one sentence on why.
        thumbnails: A small copy of each image as a `data:` address, `""` of a refused one; empty
            where none were asked for.
    """

    rows: SparseRows
    names: tuple[str, ...]
    digests: tuple[str, ...]
    refused: Mapping[int, str] = field(default_factory=dict)
    thumbnails: tuple[str, ...] = ()

    @property
    def kept(self) -> npt.NDArray[np.int64]:
        """Places of the images that have a vector, ascending."""
        return np.array([i for i in range(len(self.names)) if i not in self.refused], np.int64)

    def __len__(self) -> int:
        """Number of images, refused ones included."""
        return len(self.names)
