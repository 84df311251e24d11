"""`SparseEncoder`: texts to sparse vectors over token ids.

    texts -> token ids [T] -> hidden states [T, H] -> pooled scores [B, V] -> `SparseRows`

Packed all the way: no padding in the body, and never `[B, L, V]` in the head.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from vdr_db.checkpoints.plan import (
    Compatibility,
    Entry,
    FromCheckpoint,
    Padding,
    compatibility_of,
)
from vdr_db.checkpoints.weights import named_weights
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
from vdr_db.encoders.sides import TextSide, gated_rows, in_order, static_rows, warn_of_cuts
from vdr_db.kernels import Activation, Backend
from vdr_db.sparse import SparseRows
from vdr_db.text.tokenization import TextTokenizer, TokenizedTexts
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.packing import TextItem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vdr_db.checkpoints.export import Card
    from vdr_db.encoders.text_cuda import QueryGraphs
    from vdr_db.towers.static import StaticTower
    from vdr_db.towers.text import Tower

__all__ = ["Side", "SparseEncoder"]

Side: TypeAlias = Literal["document", "query"]


class SparseEncoder(Encoder):
    """Texts to sparse vectors, one tower for documents and one for queries, often the same.

    Get one with `SparseEncoder.from_pretrained`. A text's vector depends on that text alone: alone,
    in a batch or shuffled, its bits are the same on one device, dtype and backend on the CPU. A GPU
    picks its matrix kernels by batch size, so there it holds up to rounding.

    Encoding is safe from several threads at once, as long as nobody trains or changes the encoder
    meanwhile; threads share torch's pool of workers, so they do not make it faster.

    Attributes:
        document_tower: Module for documents.
        query_tower: Module for queries, or static weights; the same object when shared.
        document_entry: Maximal length, k and prompt of documents; `query_entry` of queries.
        lexical: Whether a text's own tokens are always kept.
        compatibility: How VDR's published code pads, see `from_pretrained`; None for no padding.
        truncated: How many texts were cut to the maximal length so far.
        query_graphs: Whether small batches of queries are replayed as CUDA graphs; off unless set.
            It saves launches where a query takes about a millisecond, on a GPU in float16 or
            bfloat16, and holds up to 256 MB there. Not together with `lexical`.
    """

    def __init__(
        self,
        *,
        document_tower: Tower,
        query_tower: Tower,
        tokenizer: TextTokenizer,
        vocabulary: Vocabulary,
        activation: Activation,
        document_entry: Entry,
        query_entry: Entry,
        norm: bool = False,
        lexical: bool = False,
        query_tokenizer: TextTokenizer | None = None,
        query_activation: Activation | None = None,
        query_gate: StaticTower | None = None,
        compatibility: Compatibility | Padding | None = None,
        backend: Backend = "auto",
        model: str = "",
        revision: str = "",
        digest: str = "",
    ) -> None:
        """Puts an encoder together; `from_pretrained` is the usual way.

        Args:
            document_tower: Module for documents.
            query_tower: Module for queries; pass the same object to share.
            tokenizer: Of both towers.
            vocabulary: Of both heads.
            activation: Turns scores into weights.
            document_entry: Of documents.
            query_entry: Of queries.
            norm: Scale each vector to L2 norm 1 before selection.
            lexical: Always keep a text's own tokens.
            query_tokenizer: Of the queries, where it is another one with the same tokens.
            query_activation: Of the queries, where it is another one.
            query_gate: Static weights that a query's vector is multiplied with.
            compatibility: See `from_pretrained`.
            backend: Of the kernels.
            model: Name for the stamp.
            revision: Revision for the stamp.
            digest: Of the weights, where it is known; else they are read when it is asked for.

        Raises:
            ConfigError: An option is impossible for this model.
        """
        super().__init__(
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            activation=activation,
            norm=norm,
            backend=backend,
            model=model,
            revision=revision,
        )
        self.document_tower = document_tower
        self.query_tower = query_tower
        self.lexical = lexical
        self.compatibility = Compatibility.of(compatibility)
        self.query_tokenizer = query_tokenizer
        self.query_activation = query_activation
        self.query_gate = query_gate
        self.document_entry, self.query_entry = document_entry, query_entry
        self.document_entry = self.side("document").checked_entry(vocabulary.columns)
        self.query_entry = self.side("query").checked_entry(vocabulary.columns)
        self.truncated = 0
        self.query_graphs = False
        self._graphs: QueryGraphs | None = None
        self._lock = threading.Lock()
        self._know_weights(digest)

    def __getstate__(self) -> dict[str, Any]:
        # A lock and captured graphs are of one process and one device.
        return {**self.__dict__, "_lock": None, "_graphs": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        k: int | FromCheckpoint | None = "checkpoint",
        query_k: int | FromCheckpoint | None = "checkpoint",
        max_length: int | None = None,
        query_max_length: int | None = None,
        lexical: bool | None = None,
        activation: Activation | None = None,
        head: str | None = None,
        vocabulary: str | None = None,
        compatibility: Compatibility | Padding | None = None,
        backend: Backend = "auto",
        tokenizer: Any = None,
        special_tokens_as_text: bool | None = None,
        revision: str | None = None,
        pool_padding: Padding | bool | None = None,
        padding_batch_size: int | None = None,
    ) -> SparseEncoder:
        """An encoder out of a model folder or from the hub.

        Reads folders of this library, of sentence-transformers sparse encoders with routers and
        static query weights, of VDR's published code (vsearch), of bge-m3 and uniCOIL, and of
        masked language models that transformers has a class for. What no option says, the folder
        does; what would change vectors and cannot be applied is refused by name.

        Args:
            name_or_folder: A folder, else the id of a model on the hub.
            device: Where to compute; None for CUDA if there is one, else the CPU.
            dtype: Of weights and hidden states, such as `torch.bfloat16` or `"float16"`; None for
                float32. Scores are float32 in any case.
            k: Dimensions kept per text; None keeps all that have a weight. The checkpoint says 768
                for VDR, `max_active_dims` for sentence-transformers, and all for other SPLADE
                models.
            query_k: The same for queries only; left alone, it follows `k` where that is given.
            max_length: Most tokens of a text, special tokens included.
            query_max_length: The same for queries only; None follows `max_length` where given.
            lexical: Whether a text's own tokens are kept in addition to the k largest. None means
                as saved, which is off for all published models: their figures were made so.
            activation: Instead of the checkpoint's.
            head: `"vdr"` on a Hugging Face folder starts a new VDR encoder from that model, with a
                fresh norm, to be trained.
            vocabulary: Kind of the columns, instead of the checkpoint's.
            compatibility: Let padding take part in the maximum, as VDR's published code does: it
                reproduces its numbers and is good for nothing else. A vector then depends on how
                its text was padded, each text costs as much as the longest, and pads add
                dimensions that nothing in the text stands for. `"max_length"` pads to the maximal
                length, as for the published results; `"longest"` to the longest of each 128 texts
                in the given order, as later versions do; `Compatibility("longest", n)` of
                `vdr_db.checkpoints.plan` to the longest of each n.
            backend: Of the kernels: `"auto"`, `"reference"`, `"cpu"` or `"triton"`.
            tokenizer: A tokenizer or a folder with one, for folders that hold none.
            special_tokens_as_text: Whether `[MASK]` and the like in a text are text to a model too,
                as they are to static sides and to bags of tokens. None means as the folder says,
                which mostly is that they are special, as in sentence-transformers.
            revision: Branch, tag or commit on the hub.
            pool_padding: Older name of `compatibility`.
            padding_batch_size: Older name of the number in `Compatibility("longest", n)`.

        Raises:
            ConfigError: The folder, a file in it, or an option is impossible; the message says
                which and why.
            MissingExtraError: A package of the extra `encode` is not installed.
        """
        from vdr_db.checkpoints.text import LoadOptions, load_text

        padding = compatibility_of(compatibility, pool_padding, padding_batch_size)
        options = LoadOptions(
            device=device,
            dtype=dtype,
            k=k,
            query_k=query_k,
            max_length=max_length,
            query_max_length=query_max_length,
            lexical=lexical,
            activation=activation,
            head=head,
            vocabulary=vocabulary,
            tokenizer=tokenizer,
            special_tokens_as_text=special_tokens_as_text,
            revision=revision,
        )
        parts = load_text(name_or_folder, options)
        return cls(**vars(parts), compatibility=padding, backend=backend)

    def save_pretrained(self, folder: str | os.PathLike[str], *, card: Card | None = None) -> None:
        """Writes the encoder as a folder that `from_pretrained` reads; all of it or nothing.

        An encoder saved there before is replaced; anything else is left alone. It also opens with
        sentence-transformers, with equal vectors; where a head needs a module of ours there, that
        asks for `trust_remote_code=True`.

        Args:
            folder: Where to; made with its parents if need be.
            card: What its README.md says besides.

        Raises:
            ConfigError: The place holds something else, or cannot be written.
        """
        from vdr_db.checkpoints.saving import save_text
        from vdr_db.checkpoints.text import TextParts

        save_text(self._parts(TextParts), folder, card)

    # What it is

    @property
    def is_shared(self) -> bool:
        """Whether documents and queries go through one tower."""
        return self.document_tower is self.query_tower

    @property
    def _main_tower(self) -> Tower:
        return self.document_tower

    @property
    def _stored_k(self) -> int | None:
        return self.document_entry.k

    def named_tensors(self) -> dict[str, Tensor]:
        """All weights by our names; those of a shared tower once."""
        return named_weights(self.document_tower, self.query_tower)

    def __repr__(self) -> str:
        """What it computes and where."""
        head = f"head={self.document_tower.head_name!r}"
        return self._described(head, f"activation={self.activation!r}")

    # Encoding

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

    def bag_of_tokens(self, texts: Iterable[str]) -> SparseRows:
        """The set of tokens of each text with weight 1; the model is not run.

        Texts are cut as documents are, and counted in `truncated`.

        Raises:
            TypeError: One `str` came instead of a sequence.
            InputError: An item is not a text, or holds a lone surrogate.
        """
        tokens = self.tokenizer.encode(checked_texts(texts), special_as_text=True)
        frame = self.frame("document")
        self._count_truncated(tokens.lengths, frame, stacklevel=3)
        cut = tokens.cut(np.arange(len(tokens.lengths)), frame.own, left=frame.cuts_left)
        return self.vocabulary.bag_of_tokens(cut.input_ids, cut.cu_seqlens)

    def token_ids(self, text: str) -> list[int]:
        """Own token ids of one text, uncut and without special tokens."""
        return [int(i) for i in self.tokenizer.encode(checked_texts([text])).input_ids]

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

    def side(self, side: Side) -> TextSide:
        """What makes vectors of the texts of one side, `"document"` or `"query"`."""
        if side == "document":
            return TextSide(
                self.document_tower, self.document_entry, self.tokenizer, self.activation
            )
        return TextSide(
            self.query_tower,
            self.query_entry,
            self.query_tokenizer or self.tokenizer,
            self.query_activation or self.activation,
            self.query_gate,
        )

    def _encode(
        self, side: Side, texts: Iterable[str], token_budget: int | None, show_progress: bool
    ) -> SparseRows:
        way, raw = self.side(side), checked_texts(texts)
        frame = way.frame()
        tokens = own = way.encode(raw)
        if way.entry.prompt:
            tokens = way.encode([way.entry.prompt + text for text in raw])
        self._count_truncated(tokens.lengths, frame, stacklevel=4)
        is_empty = own.lengths == 0
        if way.static is not None:
            return static_rows(way.static, tokens, is_empty, frame, way.entry.k)
        planned = plan_texts(
            tokens.lengths,
            frame,
            self.compatibility,
            is_empty=is_empty,
            tokens=checked_budget(token_budget, self.device.type),
            rows=POOLED_BYTES // (4 * self.vocabulary.columns) if way.tower.packs_exactly else 1,
        )
        from vdr_db.encoders.text_torch import TextScoring, queue_on

        scoring = TextScoring(
            way.tower,
            self.vocabulary,
            None if way.gate else way.entry.k,
            way.activation,
            self.norm,
            self.backend,
            lexical=partial(self._own_tokens, tokens, frame=frame),
        )
        graphs = self._graphs_of(way) if side == "query" else None
        packed = packed_batches(tokens, planned[0], frame, self.compatibility)
        with way.tower.evaluating(), progress(len(raw), "text", shown=show_progress) as bar:
            found = scoring.rows_of(packed, queue_on(self.device), graphs)
            rows = in_order(found, planned[1], self.vocabulary.size, bar)
        return rows if way.gate is None else gated_rows(way, rows, tokens)

    def _graphs_of(self, way: TextSide) -> QueryGraphs | None:
        from vdr_db.encoders.text_cuda import QueryGraphs
        from vdr_db.towers.text import Tower

        if not self.query_graphs or self.lexical or way.gate or not isinstance(way.tower, Tower):
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

    def _count_truncated(
        self, lengths: npt.NDArray[np.int64], frame: Frame, *, stacklevel: int
    ) -> None:
        count = int((lengths > frame.own).sum())
        if not count:
            return
        with self._lock:
            is_first = self.truncated == 0
            self.truncated += count
        if is_first:
            warn_of_cuts(count, frame.max_length, stacklevel=stacklevel + 1)
