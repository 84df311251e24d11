"""What a vector says and why two of them match, as data; `items` and `matches` make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vdr_db.errors import ConfigError
from vdr_db.explain.attribution import Attribution
from vdr_db.explain.own import own_score
from vdr_db.explain.spans import NOWHERE, Mark, marks, word_groups
from vdr_db.explain.words import Reason, matched_words
from vdr_db.sparse import SparseRows
from vdr_db.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from vdr_db.connectors.base import Id

__all__ = ["Explanation", "Fired", "Match", "ShownImage"]

IMAGE_TYPES = ("image/gif", "image/jpeg", "image/png", "image/webp")


@dataclass(frozen=True)
class ShownImage:
    """An image as a browser shows it: what the patches were cut from, crop included.

    Attributes:
        data: The bytes of the file.
        media_type: One of `IMAGE_TYPES`.
        width: In pixels.
        height: In pixels.

    Raises:
        ConfigError: The type is another one, or a side is not positive.
    """

    data: bytes
    media_type: str
    width: int
    height: int

    def __post_init__(self) -> None:
        if self.media_type not in IMAGE_TYPES:
            raise ConfigError(
                f"`media_type` must be one of {list(IMAGE_TYPES)}, got {self.media_type!r}; "
                "save the image as PNG."
            )
        if self.width < 1 or self.height < 1:
            raise ConfigError(f"an image must have pixels, got {self.width} x {self.height}.")


@dataclass(frozen=True)
class Fired:
    """A word of a text, or a special token, with what fires on it.

    Attributes:
        label: The word as it is written, or the token.
        words: Words of the vector whose weight comes from here, heaviest first.
        is_special: Whether it is a token around the text, not in it.
    """

    label: str
    words: Sequence[tuple[str, float]]
    is_special: bool


@dataclass(frozen=True)
class Explanation:
    """What the vector of one text or image says.

    Attributes:
        heading: What it is, such as `"query"`.
        text: The text, `""` for an image.
        words: Words with weights, heaviest first.
        nonzeros: Weights in the vector.
        vocabulary: Names of token ids.
        attribution: Which position fires which word, where that is known.
        image: The image, if it is one.
        thumbnail: A `data:` address of a small copy, where the image itself is not at hand.
        own: Token id -> how much of its weight is the text's own word, in an encoder with own
            weights; the rest is the model's.
    """

    heading: str
    text: str
    words: Sequence[tuple[str, float]]
    nonzeros: int
    vocabulary: Vocabulary
    attribution: Attribution | None = None
    image: ShownImage | None = None
    thumbnail: str = ""
    own: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of_image(
        cls,
        vocabulary: Vocabulary,
        row: SparseRows,
        image: ShownImage,
        *,
        attribution: Attribution | None = None,
        heading: str = "image",
    ) -> Explanation:
        """The explanation of an image by its vector, one row, and its weights per patch."""
        words = matched_words(vocabulary, [], row.to_dicts()[0])
        return cls(heading, "", words, row.nnz, vocabulary, attribution, image)

    @property
    def is_image(self) -> bool:
        """Whether there is something to look at."""
        return self.image is not None or bool(self.thumbnail)

    def fired(self) -> list[Fired]:
        """Every word of the text in order with what fires on it; empty without attribution."""
        attribution = self.attribution
        if attribution is None or not attribution.spans:
            return []
        found = []
        for group in word_groups(self.text, attribution.spans):
            weights = dict(pair for position in group for pair in attribution.fired(position))
            start, stop = attribution.spans[group[0]][0], attribution.spans[group[-1]][1]
            is_special = attribution.spans[group[0]] == NOWHERE
            label = attribution.positions[group[0]] if is_special else self.text[start:stop]
            pieces = [] if is_special else self._ids(attribution, group)
            words = self.vocabulary.merge_word_pieces(pieces, weights)
            found.append(Fired(label, words, is_special))
        return found

    def marks(self, shares: dict[int, float] | None = None) -> list[Mark]:
        """Parts of the text that count, by the share of each token id or the vector's weights."""
        attribution = self.attribution
        if attribution is None or not attribution.spans:
            return []
        totals = attribution.totals if shares is None else attribution.totals_of(shares)
        return marks(self.text, attribution.spans, totals.tolist())

    def _ids(self, attribution: Attribution, group: Sequence[int]) -> list[int]:
        return [self.vocabulary.id(attribution.positions[position]) for position in group]


@dataclass(frozen=True)
class Match:
    """Why a document is a hit.

    Attributes:
        query: The query's explanation.
        document: The document's.
        reasons: Each shared word with its share of the score, largest first.
        score: Their sum.
        id: Of the document.
    """

    query: Explanation
    document: Explanation
    reasons: Sequence[Reason]
    score: float
    id: Id

    @property
    def own_score(self) -> float:
        """What the score would be by own words alone; the rest is the model's."""
        return own_score(self.query.own, self.document.own)

    def shares(self) -> dict[int, float]:
        """Token id -> its share of the score."""
        return {term.id: term.product for reason in self.reasons for term in reason.terms}
