"""Own weights: a text's own tokens with the weights that BM25 would give them, as rows.

    own[c] = query factor * tf[c]                                               of a query
    own[c] = document factor * idf[c] * tf[c] (k1 + 1) / (tf[c] + k1 (1 - b + b L / mean length))

`c = canon[token]`: tokens of one word stem count as one, the smallest id among them, so that a
table replaces the stemmer. `tf[c]` is how often they stand in the text, L the number of its tokens
as it was cut. The IDF is that of general text, not of a collection: a text's row depends on that
text alone.

Source: the non-parametric entry BoW(x) of Zhou et al., "Retrieval-based Disentangled Representation
Learning with Natural Language Supervision", ICLR 2024, with the weights of Robertson and Zaragoza,
"The Probabilistic Relevance Framework: BM25 and Beyond", 2009.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vdr_db.errors import ConfigError, require
from vdr_db.sparse import SparseRows
from vdr_db.text.tokenization import TextTokenizer, TokenizedTexts
from vdr_db.text.vocabulary import Vocabulary

__all__ = ["OWN_WEIGHTS_FILE", "OwnWeights", "joined", "stem_table"]

OWN_WEIGHTS_FILE = "own_weights.safetensors"
"""The tables in a model folder."""

WORD_MARKS = ("\u2581", "\u0120")
"""First letter of whole words in vocabularies of sentence-piece and of byte-level BPE."""

_TEXTS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class OwnWeights:
    """Tables and numbers of the module's formulas.

    Attributes:
        canon: `[size]` int32: the token id that each token counts as, −1 for none.
        idf: `[size]` float32, of the ids that tokens count as.
        query_factor: Of queries, above 0.
        document_factor: Of documents, above 0.
        k1: Where the count of a token saturates.
        b: How much the length of a text matters, 0 to 1.
        mean_length: Length that is neither short nor long, in tokens.

    Raises:
        ConfigError: A table or a number is impossible.
    """

    canon: npt.NDArray[np.int32]
    idf: npt.NDArray[np.float32]
    query_factor: float = 1.0
    document_factor: float = 1.0
    k1: float = 1.2
    b: float = 0.75
    mean_length: float = 120.0

    def __post_init__(self) -> None:
        size = self.canon.size
        if self.canon.shape != (size,) or self.idf.shape != (size,):
            raise ConfigError(
                f"`canon` and `idf` must hold one number for each token, got {self.canon.shape} "
                f"and {self.idf.shape}; take both of one tokenizer."
            )
        if size and not (self.canon.min() >= -1 and self.canon.max() < size):
            raise ConfigError(
                f"`canon` must hold token ids below {size}, or -1, got {self.canon.min()} to "
                f"{self.canon.max()}; make the tables anew."
            )
        if not (np.isfinite(self.idf).all() and (self.idf >= 0).all()):
            raise ConfigError("`idf` must be finite and not negative; make the tables anew.")
        said = self.numbers()
        positive = all(np.isfinite(x) and x > 0 for name, x in said.items() if name != "b")
        if not positive or not 0 <= self.b <= 1:
            raise ConfigError(
                f"factors, k1 and mean length must be above 0 and b in [0, 1], got {said}."
            )

    @classmethod
    def fitted(
        cls,
        tokenizer: TextTokenizer,
        vocabulary: Vocabulary,
        texts: Iterable[str],
        **numbers: float,
    ) -> OwnWeights:
        """Tables for a tokenizer: stems of its English words, and their IDF in some texts.

        Args:
            tokenizer: Of the model.
            vocabulary: Of its head: special tokens and tokens without a column count as none.
            texts: General text, some 10,000 documents or more.
            numbers: Other fields.

        Raises:
            MissingExtraError: `PyStemmer` is not installed.
        """
        canon = stem_table(vocabulary)
        counts, total = np.zeros(canon.size, np.int64), 0
        for chunk in _chunks(texts):
            tokens = tokenizer.encode(chunk)
            owners = np.repeat(np.arange(len(chunk)), tokens.lengths)
            ids = canon[tokens.input_ids].astype(np.int64)
            keys = np.unique((owners * canon.size + ids)[ids >= 0])
            counts += np.bincount(keys % canon.size, minlength=canon.size)
            total += len(chunk)
        idf = np.log1p((total - counts + 0.5) / (counts + 0.5)).astype(np.float32)
        return cls(canon, idf, **numbers)

    @classmethod
    def read(cls, folder: Path, numbers: Mapping[str, Any]) -> OwnWeights:
        """The tables of a model folder, and the numbers of its settings file.

        Raises:
            ConfigError: The file is missing or damaged, or a number is impossible.
        """
        from safetensors.numpy import load_file

        file = folder / OWN_WEIGHTS_FILE
        try:
            tables = load_file(file)
            return cls(
                tables["canon"].astype(np.int32), tables["idf"].astype(np.float32), **numbers
            )
        except ConfigError:
            raise
        except Exception as error:  # the library raises many kinds for a damaged file
            raise ConfigError(
                f"{file} must hold the tables `canon` and `idf` of own weights, but {error!r}; "
                "fetch the model again."
            ) from error

    def save(self, folder: Path) -> None:
        """Writes the tables; `numbers` go to the settings file."""
        from safetensors.numpy import save_file

        save_file({"canon": self.canon, "idf": self.idf}, folder / OWN_WEIGHTS_FILE)
        (folder / OWN_WEIGHTS_FILE).chmod(0o644)

    def numbers(self) -> dict[str, float]:
        """All fields but the tables."""
        names = [field.name for field in fields(self) if field.name not in ("canon", "idf")]
        return {name: float(getattr(self, name)) for name in names}

    @cached_property
    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """Everything that a row depends on, as float32 by name, for a model's digest."""
        return {
            "own_weights.canon": self.canon.astype(np.float32),
            "own_weights.idf": self.idf,
            "own_weights.numbers": np.array([*self.numbers().values()], np.float32),
        }

    def rows(self, side: Literal["document", "query"], tokens: TokenizedTexts) -> SparseRows:
        """Own weights of texts.

        Args:
            side: Whose formula.
            tokens: The texts' own tokens as they were cut.

        Returns:
            One row for each text over token ids.
        """
        size, lengths = self.canon.size, tokens.lengths
        owners = np.repeat(np.arange(lengths.size), lengths)
        ids = self.canon[tokens.input_ids].astype(np.int64)
        keys, counts = np.unique((owners * size + ids)[ids >= 0], return_counts=True)
        rows, ids = keys // size, keys % size
        weights = self.query_factor * counts
        if side == "document":
            shift = self.k1 * (1 - self.b + self.b * lengths[rows] / self.mean_length)
            saturated = counts * (self.k1 + 1) / (counts + shift)
            weights = self.document_factor * self.idf[ids] * saturated
        values = weights.astype(np.float32)
        kept = values > 0
        indptr = np.zeros(lengths.size + 1, np.int64)
        np.cumsum(np.bincount(rows[kept], minlength=lengths.size), out=indptr[1:])
        return SparseRows(indptr, ids[kept].astype(np.int32), values[kept], size)


def joined(
    rows: SparseRows, own: SparseRows, k: int | None, always: SparseRows | None = None
) -> SparseRows:
    """The sum of a model's weights and own weights, of which the k largest stay.

    The k largest of a sum are among the model's own k largest and the columns with own weights, so
    these are all that `rows` need to hold. Ties go to the smallest id.

    Args:
        rows: The model's weights of N texts: at least its k largest, and those of own columns.
        own: `[N]` rows of `OwnWeights.rows`.
        k: How many to keep, or None for all.
        always: Rows of ids that stay besides; their weights do not matter.
    """
    width = rows.shape[1]
    keys = np.concatenate([_keys(rows), _keys(own)])
    unique, place = np.unique(keys, return_inverse=True)
    weights = np.zeros(unique.size, np.float32)  # in float32 as each part is: two summands at most
    np.add.at(weights, place, np.concatenate([rows.values, own.values]))
    indptr = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(np.bincount(unique // width, minlength=len(rows)), out=indptr[1:])
    total = SparseRows(indptr, (unique % width).astype(np.int32), weights, width)
    if k is None:
        return total
    kept = total.topk(k)
    if always is None:
        return kept
    wanted = np.isin(unique, np.concatenate([_keys(kept), _keys(always)]))
    np.cumsum(np.bincount(unique[wanted] // width, minlength=len(rows)), out=indptr[1:])
    return SparseRows(indptr, (unique[wanted] % width).astype(np.int32), weights[wanted], width)


def stem_table(vocabulary: Vocabulary) -> npt.NDArray[np.int32]:
    """`[size]`: for each token the smallest id of a whole word with its English stem, or itself.

    Special tokens, and tokens whose id has no column, count as none: −1.

    Raises:
        MissingExtraError: `PyStemmer` is not installed.
    """
    stem = require("Stemmer", "cli").Stemmer("english").stemWord
    canon = np.arange(vocabulary.size, dtype=np.int32)
    first: dict[str, int] = {}
    counts = vocabulary.id_to_column >= 0
    counts[list(vocabulary.special_ids)] = False
    is_marked = any(token.startswith(WORD_MARKS) for token in vocabulary.tokens)
    for id, token in enumerate(vocabulary.tokens):
        word = token[1:] if is_marked and token.startswith(WORD_MARKS) else token
        is_whole = word != token or not is_marked
        if counts[id] and is_whole and word.isascii() and word.isalpha():
            canon[id] = first.setdefault(stem(word.lower()), id)
    canon[~counts] = -1
    return canon


def _keys(rows: SparseRows) -> npt.NDArray[np.int64]:
    owners = np.repeat(np.arange(len(rows)), np.diff(rows.indptr))
    keys: npt.NDArray[np.int64] = owners * rows.shape[1] + rows.indices
    return keys


def _chunks(texts: Iterable[str]) -> Iterator[Sequence[str]]:
    left = iter(texts)
    while chunk := list(islice(left, _TEXTS_AT_ONCE)):
        yield chunk
