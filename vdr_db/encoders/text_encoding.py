"""How an encoder of texts encodes: planned, packed, scored, and put in the order of the texts.

    texts -> token ids [T] -> hidden states [T, H] -> pooled scores [B, V] -> `SparseRows`

Packed all the way: no padding in the body, and never `[B, L, V]` in the head.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from vdr_db.checkpoints.plan import Compatibility
from vdr_db.encoders.base import Encoder, progress
from vdr_db.encoders.batching import (
    POOLED_BYTES,
    Frame,
    PackedBatch,
    checked_budget,
    pack,
    packed_batches,
    plan_texts,
)
from vdr_db.encoders.checks import checked_texts
from vdr_db.encoders.scanning import HeadChoice
from vdr_db.encoders.sides import TextSide, gated_rows, in_order, static_rows, warn_of_cuts
from vdr_db.encoders.text_onnx import OnnxScoring
from vdr_db.sparse import SparseRows
from vdr_db.text.own_weights import OwnWeights, joined
from vdr_db.text.passages import Span, passage_spans
from vdr_db.text.tokenization import TokenizedTexts
from vdr_db.towers.onnx import OnnxTextTower
from vdr_db.towers.packing import TextItem

if TYPE_CHECKING:
    from vdr_db.encoders.text_cuda import QueryGraphs
    from vdr_db.encoders.text_torch import TextScoring

__all__ = ["Side", "TextEncoding"]

Side: TypeAlias = Literal["document", "query"]


class TextEncoding(Encoder):
    """Encodes the texts of its two sides; `SparseEncoder` says what they are made of.

    Attributes:
        lexical: Whether a text's own tokens are always kept.
        own_weights: What a text's own tokens weigh besides; None for nothing.
        compatibility: How VDR's published code pads; None for no padding.
        truncated: How many texts were cut to the maximal length so far.
        query_graphs: Whether small batches of queries are replayed as CUDA graphs.
    """

    lexical: bool
    own_weights: OwnWeights | None
    compatibility: Compatibility | None
    truncated: int
    query_graphs: bool
    _graphs: QueryGraphs | None
    _choices: dict[str, HeadChoice]
    _lock: threading.Lock

    @abstractmethod
    def side(self, side: Side) -> TextSide:
        """What makes vectors of the texts of one side, `"document"` or `"query"`."""

    def encode_documents(
        self,
        texts: Iterable[str],
        *,
        token_budget: int | None = None,
        show_progress: bool = False,
    ) -> SparseRows:
        """Vectors of documents.

        A text without tokens of its own (empty, or only white space) gets an empty row, not the
        vector of the special tokens around it, so that no search ever finds it. Only with
        `compatibility` it gets what the published code gives it.

        Args:
            texts: The documents; not one `str`.
            token_budget: Most tokens in a batch; less takes less memory. None for 4,096 on the CPU
                and 32,768 elsewhere.
            show_progress: Draw a progress bar on stderr.

        Returns:
            One row for each text, in the order of the texts.

        Raises:
            TypeError: One `str` came instead of a sequence.
            InputError: An item is not a text, or holds a lone surrogate; the message says which.
            ConfigError: A vector is not finite, so the weights of the model are broken; or
                `token_budget` is not positive.
        """
        return self._encode("document", texts, token_budget, show_progress)

    def encode_queries(
        self,
        texts: Iterable[str],
        *,
        token_budget: int | None = None,
        show_progress: bool = False,
    ) -> SparseRows:
        """Vectors of queries; arguments, result and errors as in `encode_documents`."""
        return self._encode("query", texts, token_budget, show_progress)

    def bag_of_tokens(self, texts: Iterable[str], side: Side = "document") -> SparseRows:
        """The set of tokens of each text with weight 1; the model is not run.

        Texts are cut as documents are, and counted in `truncated`. With `own_weights` these are
        what comes back: tokens merged by stem, weighted as those of a document or of a query.

        Raises:
            TypeError: One `str` came instead of a sequence.
            InputError: An item is not a text, or holds a lone surrogate.
        """
        frame = self.frame("document")
        tokens = self.tokenizer.encode(checked_texts(texts), special_as_text=True, most=frame.own)
        self._count_truncated(tokens.lengths, frame)
        cut = self._cut(tokens, frame)
        if self.own_weights is not None:
            return self.own_weights.rows(side, cut)
        return self.vocabulary.bag_of_tokens(cut.input_ids, cut.cu_seqlens)

    def token_ids(self, text: str) -> list[int]:
        """Own token ids of one text, uncut and without special tokens."""
        return [int(i) for i in self.tokenizer.encode(checked_texts([text])).input_ids]

    def cut_passages(self, texts: Sequence[str], *, tokens: int, overlap: int) -> list[list[Span]]:
        """Where each text is cut into passages that the model reads as a whole.

        Args:
            texts: Documents.
            tokens: Most tokens of a passage; fewer where the model reads fewer.
            overlap: Most tokens that neighbours share; see `vdr_db.text.passages`.

        Returns:
            Spans of each text, which cover it.
        """
        way, raw = self.side("document"), checked_texts(texts)
        prompt = way.encode([way.entry.prompt]).input_ids.size if way.entry.prompt else 0
        readable = max(1, way.frame().own - prompt)
        found = []
        for text, offsets in zip(raw, way.tokenizer.offsets(raw), strict=True):
            most = min(tokens, readable)
            while True:
                spans = passage_spans(text, offsets, tokens=most, overlap=min(overlap, most // 2))
                # A part of a word can have more tokens by itself than it had in its text.
                parts = [text[start:stop] for start, stop in spans] if len(spans) > 1 else []
                longest = int(way.encode(parts).lengths.max(initial=0))
                if longest <= readable or most == 1:
                    break
                most = max(1, most - (longest - readable))
            found.append(spans)
        return found

    def own_tokens(self, text: str, side: Side = "document") -> TokenizedTexts:
        """Own tokens of one text as a side reads it: cut, without prompt and special tokens."""
        return self._cut(self.side(side).encode(checked_texts([text])), self.frame(side))

    def frame(self, side: Side) -> Frame:
        """What stands around a text of one side, `"document"` or `"query"`, and its length."""
        return self.side(side).frame()

    def item(self, side: Side, text: str) -> TextItem:
        """One text as the tower of its side reads it: its prompt before it, cut, framed, padded.

        Args:
            side: `"document"` or `"query"`.
            text: The text.
        """
        way = self.side(side)
        frame = way.frame()
        tokens = way.encode([way.entry.prompt + text])
        is_padded = self.compatibility is not None and self.compatibility.padded_to == "max_length"
        padded_to = frame.max_length if is_padded else None
        return pack(tokens, np.zeros(1, np.int64), frame, padded_to=padded_to).item(0)

    def _encode(
        self, side: Side, texts: Iterable[str], token_budget: int | None, show_progress: bool
    ) -> SparseRows:
        way, raw = self.side(side), checked_texts(texts)
        frame = way.frame()
        tokens = own = way.encode(raw)
        if way.entry.prompt:
            tokens = way.encode([way.entry.prompt + text for text in raw])
        self._count_truncated(tokens.lengths, frame)
        is_empty = own.lengths == 0
        added = self._own_rows(side, own, frame)
        if way.static is not None:
            k = way.entry.k if added is None else None
            rows = static_rows(way.static, tokens, is_empty, frame, k)
            return rows if added is None else joined(rows, added, way.entry.k)
        planned = plan_texts(
            tokens.lengths,
            frame,
            self.compatibility,
            is_empty=is_empty,
            tokens=checked_budget(token_budget, self.device.type),
            rows=POOLED_BYTES // (4 * self.vocabulary.columns) if way.tower.packs_exactly else 1,
        )
        kept = partial(self._kept_tokens, tokens, added, frame=frame)
        scoring = self._scoring(side, way, kept)
        packed = packed_batches(tokens, planned[0], frame, self.compatibility)
        with progress(len(raw), "text", shown=show_progress) as bar:
            found = scoring.rows_of(packed)
            if added is not None:
                found = self._joined(found, added, tokens, way)
            rows = in_order(found, planned[1], self.vocabulary.size, bar)
        return rows if way.gate is None else gated_rows(way, rows, tokens)

    def _scoring(
        self, side: Side, way: TextSide, lexical: Callable[[PackedBatch], SparseRows | None]
    ) -> OnnxScoring | TextScoring:
        """How the texts of a side get their rows, by the runtime of its tower."""
        k = None if way.gate else way.entry.k
        kept = (self.vocabulary, k, way.activation, self.norm)
        if isinstance(way.tower, OnnxTextTower):
            return OnnxScoring(way.tower, *kept, self.backend, lexical, self._choices[side])
        from vdr_db.encoders.text_torch import TextScoring

        graphs = self._graphs_of(way) if side == "query" else None
        choice = self._choices[side]
        return TextScoring(way.tower, *kept, self.backend, lexical, graphs, choice)

    def _graphs_of(self, way: TextSide) -> QueryGraphs | None:
        from vdr_db.encoders.text_cuda import QueryGraphs
        from vdr_db.towers.text import Tower

        if not (self.query_graphs and isinstance(way.tower, Tower)):
            return None
        if self.lexical or self.own_weights or way.gate:
            return None

        frame, options = way.frame(), (way.entry.k, way.activation, self.norm, self.backend)
        if self._graphs is None or not self._graphs.is_for(way.tower, options):
            self._graphs = QueryGraphs(way.tower, options, (frame.pad_id, frame.first_position))
        return self._graphs

    def _own_tokens(
        self, tokens: TokenizedTexts, batch: PackedBatch, frame: Frame
    ) -> SparseRows | None:
        if not self.lexical:
            return None
        cut = tokens.cut(batch.texts, frame.own, left=frame.cuts_left)
        return self.vocabulary.bag_of_tokens(cut.input_ids, cut.cu_seqlens)

    def _own_rows(self, side: Side, own: TokenizedTexts, frame: Frame) -> SparseRows | None:
        """Own weights of all texts, or None; a prompt is no part of a text."""
        if self.own_weights is None:
            return None
        return self.own_weights.rows(side, self._cut(own, frame))

    @staticmethod
    def _cut(tokens: TokenizedTexts, frame: Frame) -> TokenizedTexts:
        return tokens.cut(np.arange(len(tokens.lengths)), frame.own, left=frame.cuts_left)

    def _kept_tokens(
        self, tokens: TokenizedTexts, added: SparseRows | None, batch: PackedBatch, frame: Frame
    ) -> SparseRows | None:
        """Tokens whose weights a selection must hold, whatever they are."""
        kept = self._own_tokens(tokens, batch, frame)
        if added is None:
            return kept
        own = added[batch.texts]
        return own if kept is None else joined(kept, own, None)

    def _joined(
        self,
        found: Iterable[tuple[PackedBatch, SparseRows]],
        added: SparseRows,
        tokens: TokenizedTexts,
        way: TextSide,
    ) -> Iterator[tuple[PackedBatch, SparseRows]]:
        """Batches with own weights added to the model's, and the k largest of the sums kept."""
        for batch, rows in found:
            always = self._own_tokens(tokens, batch, way.frame())
            yield batch, joined(rows, added[batch.texts], way.entry.k, always)

    def _count_truncated(self, lengths: npt.NDArray[np.int64], frame: Frame) -> None:
        count = int((lengths > frame.own).sum())
        if not count:
            return
        with self._lock:
            is_first = self.truncated == 0
            self.truncated += count
        if is_first:
            warn_of_cuts(count, frame.max_length)
