"""Queries without a model (mode alpha): a tokenizer is all that is needed, and no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from vdr_db.checkpoints.identity import settings_of_parts
from vdr_db.checkpoints.layouts import CROSS_MODAL_FILE, OWN_FILE, TEXT_PART, read_plan
from vdr_db.checkpoints.locate import find_tokenizer, locate_model
from vdr_db.encoders.checks import checked_texts
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp
from vdr_db.text.own_weights import OwnWeights
from vdr_db.text.tokenization import TextTokenizer, TokenizedTexts
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.version import __version__

__all__ = ["TokenQueries"]

_OWN = ("tokenizer", "vocabulary", "own_weights")


class TokenQueries:
    """What an encoder is for bags of tokens: the vectors of queries are the sets of their tokens.

    A collection of encoded documents is searched by them in mode alpha; documents are not encoded.

    Args:
        tokenizer: Of the model that encoded the documents.
        stamp: Of that model; its vocabulary says which tokens may carry a weight.
        max_length: Most tokens of a text that are read; None reads all.
        own_weights: Of that model, if it has any: the weights of these tokens, instead of 1.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        stamp: EncoderStamp,
        *,
        max_length: int | None = None,
        own_weights: OwnWeights | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.own_weights = own_weights
        self.vocabulary = Vocabulary.from_tokenizer(tokenizer, stamp.vocabulary)
        self.model = stamp.model
        self.max_length = max_length
        self.truncated = 0
        own = settings_of_parts(
            {"tokenizer": tokenizer, "vocabulary": self.vocabulary, "own_weights": own_weights}
        )
        others = {k: v for k, v in stamp.settings.items() if k.partition(".")[0] not in _OWN}
        self._stamp = replace(
            stamp, tokenizer=self.vocabulary.fingerprint, settings={**others, **own}, probes={}
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        stamp: EncoderStamp | None = None,
        max_length: int | None = None,
        revision: str | None = None,
    ) -> TokenQueries:
        """The tokenizer out of a model folder or from the hub; its weights are not read.

        Args:
            name_or_folder: A folder, else the id of a model on the hub.
            stamp: That of the collection, where there is one.
            max_length: Most tokens of a text that are read; None takes the model's own.
            revision: On the hub.

        Raises:
            ConfigError: There is no such model, or a file of it is damaged.
        """
        folder, revision = locate_model(name_or_folder, revision)
        if (folder / CROSS_MODAL_FILE).is_file() and not (folder / OWN_FILE).is_file():
            folder = folder / TEXT_PART
        plan = read_plan(folder)
        tokenizer = find_tokenizer(
            (plan.folder, folder), None, hub_id=plan.tokenizer_id, lower_case=plan.lower_case
        )
        if stamp is None:
            stamp = EncoderStamp(
                model=os.fspath(name_or_folder),
                tokenizer="",
                vocabulary=plan.vocabulary,
                head=plan.head,
                activation=plan.activation,
                revision=revision,
                library_version=__version__,
            )
        return cls(
            tokenizer,
            stamp,
            max_length=max_length or plan.document_entry.max_length,
            own_weights=plan.own_weights,
        )

    def stamp(self) -> EncoderStamp:
        """Identity of the model whose tokenizer this is."""
        return self._stamp

    def bag_of_tokens(
        self, texts: Iterable[str], side: Literal["document", "query"] = "query"
    ) -> SparseRows:
        """Tokens with weight 1, or with own weights; see `SparseEncoder.bag_of_tokens`.

        Raises:
            TypeError: One `str` came instead of a sequence.
            InputError: An item is not a text, or holds a lone surrogate.
        """
        tokens = self._read(checked_texts(texts))
        if self.own_weights is not None:
            return self.own_weights.rows(side, tokens)
        return self.vocabulary.bag_of_tokens(tokens.input_ids, tokens.cu_seqlens)

    encode_queries = bag_of_tokens

    def own_tokens(self, text: str, side: Literal["document", "query"] = "query") -> TokenizedTexts:
        """Own tokens of one text as they are read."""
        return self._read(checked_texts([text]))

    def _read(self, texts: Sequence[str]) -> TokenizedTexts:
        if self.max_length is None:
            return self.tokenizer.encode(texts)
        own = self.max_length - len(self.tokenizer.prefix_ids) - len(self.tokenizer.suffix_ids)
        tokens = self.tokenizer.encode(texts, most=None if self.tokenizer.cuts_left else own)
        self.truncated += int((tokens.lengths > own).sum())
        return tokens.cut(np.arange(len(tokens.lengths)), own)

    def token_ids(self, text: str) -> list[int]:
        """Own token ids of one text, uncut and without special tokens."""
        return [int(i) for i in self.tokenizer.encode(checked_texts([text])).input_ids]
