"""Token ids as words: pieces that stand together in a text become one word again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from vdr_db.connectors.encoder import Encoder
from vdr_db.sparse import SparseRows
from vdr_db.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from vdr_db.connectors.base import Term

__all__ = ["Reason", "matched_words", "reasons", "shared_words", "shares_of"]


@dataclass(frozen=True)
class Reason:
    """What one word adds to a score.

    Attributes:
        word: The word; its pieces are joined.
        product: Its share of the score: the sum over its pieces.
        terms: Its pieces, or the word itself.
    """

    word: str
    product: float
    terms: tuple[Term, ...]


def matched_words(
    vocabulary: Vocabulary, text_ids: Sequence[int], products: Mapping[int, float]
) -> list[tuple[str, float]]:
    """Words of a vector with their weights, or of a match with their shares, heaviest first.

    Words are looked for in the token ids of texts. Pieces become one only if each of them matched:
    `cal ##ories` against `cal ##ife` is a match of `cal`, not of `calories`.
    """
    return vocabulary.merge_word_pieces(_only(vocabulary, text_ids, products), products)


def shares_of(query: SparseRows, document: SparseRows | None) -> dict[int, float]:
    """What each token of both rows adds to the score: token id -> product; None shares nothing."""
    if document is None:
        return {}
    (wanted,), (weights,) = query.to_dicts(), document.to_dicts()
    return {id: weight * weights[id] for id, weight in wanted.items() if id in weights}


def shared_words(
    encoder: Encoder, texts: Sequence[str], shares: Mapping[int, float]
) -> list[tuple[str, float]]:
    """Words two sides share, with their share of the score, heaviest first.

    Args:
        encoder: What made the vectors. One without `token_ids`, or whose vocabulary joins no
            pieces, gets its tokens back as they are.
        texts: The texts of both sides, which say what pieces are one word; an image has none.
        shares: Token id -> share of the score, see `shares_of`.
    """
    vocabulary = cast("Vocabulary", encoder.vocabulary)  # asked for what it has below
    if not (hasattr(encoder, "token_ids") and hasattr(vocabulary, "merge_word_pieces")):
        named = ((vocabulary.token(id), share) for id, share in shares.items())
        return sorted(named, key=lambda word: (-word[1], word[0]))
    gap = sorted(vocabulary.special_ids)[:1]
    ids = [id for text in texts if text for id in (*encoder.token_ids(text), *gap)]
    return matched_words(vocabulary, ids, shares)


def reasons(vocabulary: Vocabulary, text_ids: Sequence[int], terms: Sequence[Term]) -> list[Reason]:
    """A score taken apart into words, the largest share first; they add up to the same score.

    `text_ids` are those of query and document, in order, with a special id between them.
    """
    products = {term.id: term.product for term in terms}
    kept = _only(vocabulary, text_ids, products)
    inside = set(kept)
    groups: dict[str, list[Term]] = {}
    for term in terms:
        around = kept if term.id in inside else []
        ((word, _),) = vocabulary.merge_word_pieces(around, {term.id: 1.0})
        groups.setdefault(word, []).append(term)
    found = [
        Reason(word, math.fsum(term.product for term in group), tuple(group))
        for word, group in groups.items()
    ]
    return sorted(found, key=lambda reason: (-reason.product, reason.word))


def _only(
    vocabulary: Vocabulary, text_ids: Sequence[int], wanted: Mapping[int, float]
) -> list[int]:
    # A special token parts what stands left and right of it, as a piece without a match must.
    gap = sorted(vocabulary.special_ids)[:1]
    kept: list[int] = []
    for id in text_ids:
        kept += [id] if id in wanted else gap
    return kept
