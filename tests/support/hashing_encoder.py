"""An encoder without a model: rows that depend on the text alone, thousands a second.

For tests of what happens to rows after they are made; encoders have tests of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

__all__ = ["HashedImages", "HashingEncoder"]


@dataclass(frozen=True)
class HashedImages:
    """What `HashingEncoder.encode_images` gives, as an `ImageEncoder` would."""

    rows: SparseRows
    names: tuple[str, ...]
    digests: tuple[str, ...]
    refused: Mapping[int, str]
    thumbnails: tuple[str, ...] = ()


class _Vocabulary:
    def __init__(self, size: int) -> None:
        self.size = size


class HashingEncoder:
    """`nonzeros` weights a text, one in each of as many equal spans of the vocabulary.

    Args:
        nonzeros: Weights of each row; the empty text has none.
        width: Vocabulary size.
    """

    def __init__(self, nonzeros: int = 16, width: int = 30522) -> None:
        self.nonzeros = nonzeros
        self.vocabulary = _Vocabulary(width)
        self.calls = 0
        self._multipliers = np.arange(1, nonzeros + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )

    def stamp(self) -> EncoderStamp:
        return EncoderStamp(
            model="hashing", tokenizer=f"{self.vocabulary.size}", vocabulary="all", head="mlm",
            activation="none", k=self.nonzeros,
        )  # fmt: skip

    def encode_documents(self, texts: Sequence[str]) -> SparseRows:
        self.calls += 1
        seeds = np.array(
            [
                int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
                for text in texts
            ],
            np.uint64,
        )
        mixed = seeds[:, None] * self._multipliers  # wraps around, which is what mixes
        span = self.vocabulary.size // self.nonzeros
        ids = (mixed >> np.uint64(33)) % np.uint64(span) + np.arange(
            self.nonzeros, dtype=np.uint64
        ) * np.uint64(span)
        weights = 0.5 + (mixed >> np.uint64(50)).astype(np.float32) / np.float32(1 << 14)
        counts = np.array([self.nonzeros if text else 0 for text in texts], np.int64)
        kept = np.repeat(counts > 0, self.nonzeros)
        indptr = np.concatenate(([0], np.cumsum(counts)))
        return SparseRows(
            indptr,
            ids.ravel()[kept].astype(np.int32),
            weights.astype(np.float32).ravel()[kept],
            self.vocabulary.size,
        )

    encode_queries = encode_documents
    bag_of_tokens = encode_documents

    def encode_images(self, images: Sequence[Path]) -> HashedImages:
        """Rows that depend on the files' bytes; a file that begins with `broken` has none."""
        contents = [path.read_bytes() for path in images]
        refused = {i: "broken" for i, one in enumerate(contents) if one.startswith(b"broken")}
        digests = ["" if i in refused else hashlib.sha256(c).hexdigest() for i, c in
                   enumerate(contents)]  # fmt: skip
        return HashedImages(
            self.encode_documents(digests), tuple(map(str, images)), tuple(digests), refused
        )
