"""`SparseEncoder`: texts to sparse vectors over token ids.

    texts -> token ids [T] -> hidden states [T, H] -> pooled scores [B, V] -> `SparseRows`

Packed all the way: no padding in the body, and never `[B, L, V]` in the head.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vdr_db.checkpoints.plan import Entry
from vdr_db.checkpoints.weights import digest
from vdr_db.encoders.batching import Frame, PackedBatch, pack, plan_batches, upstream_batches
from vdr_db.encoders.checks import checked_texts
from vdr_db.encoders.selection import to_sparse_rows
from vdr_db.encoders.text_cuda import DeviceQueue, Outcome, QueryGraphs, encode_batches, score_batch
from vdr_db.errors import ConfigError
from vdr_db.kernels import ACTIVATIONS, BACKENDS, Activation, Backend
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp
from vdr_db.text.tokenization import TextTokenizer, TokenizedTexts
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.text import Tower
from vdr_db.towers.text_body import packing_is_exact
from vdr_db.version import __version__

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["FromCheckpoint", "PoolPadding", "SparseEncoder", "Tower"]

Side = Literal["document", "query"]
PoolPadding = Literal["longest", "max_length", True, False]
FromCheckpoint = Literal["checkpoint"]

TOKEN_BUDGET = {"cpu": 4096}
"""Tokens in a batch, by device type. On the CPU the head reaches its full rate from about 1,000
tokens on, and the widest layer of BERT-base takes 12 KB a token."""
TOKEN_BUDGET_ELSEWHERE = 32768

POOLED_BYTES = 1 << 26
"""Most bytes of the pooled scores `[B, V]` of a batch: 64 MB, 549 texts of BERT's vocabulary."""


class SparseEncoder:
    """Texts to sparse vectors, one tower for documents and one for queries, often the same.

    Get one with `SparseEncoder.from_pretrained`. A text's vector depends on that text alone: alone,
    in a batch or shuffled, its bits are the same on one device, dtype and backend on the CPU. A GPU
    picks its matrix kernels by batch size, so there it holds up to rounding.

    Encoding is safe from several threads at once, as long as nobody trains or changes the encoder
    meanwhile; threads share torch's pool of workers, so they do not make it faster.

    Attributes:
        vocabulary: Column, id and text of every token.
        tokenizer: The tokenizer of both towers.
        document_tower: Module for documents.
        query_tower: Module for queries; the same object when shared.
        activation: Turns scores into weights.
        document_entry: Maximal length, k and prompt of documents.
        query_entry: Maximal length, k and prompt of queries.
        lexical: Whether a text's own tokens are always kept.
        norm: Whether vectors have L2 norm 1 before selection.
        pool_padding: Compatibility mode, see `from_pretrained`.
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
        pool_padding: PoolPadding = False,
        padding_batch_size: int = 128,
        backend: Backend = "auto",
        model: str = "",
        revision: str = "",
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
            pool_padding: See `from_pretrained`.
            padding_batch_size: See `from_pretrained`.
            backend: Of the kernels.
            model: Name for the stamp.
            revision: Revision for the stamp.

        Raises:
            ConfigError: An option is impossible for this model.
        """
        if activation not in ACTIVATIONS:
            raise ConfigError(f"`activation` must be one of {ACTIVATIONS}, got {activation!r}.")
        if backend not in BACKENDS:
            raise ConfigError(f"`backend` must be one of {BACKENDS}, got {backend!r}.")
        if pool_padding not in (False, True, "longest", "max_length"):
            raise ConfigError(
                "`pool_padding` must be False, True, 'longest' or 'max_length', "
                f"got {pool_padding!r}."
            )
        if padding_batch_size < 1:
            raise ConfigError(
                f"`padding_batch_size` must be at least 1, got {padding_batch_size!r}."
            )
        self.document_tower = document_tower.eval()
        self.query_tower = query_tower.eval()
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.activation: Activation = activation
        self.norm = norm
        self.lexical = lexical
        self.pool_padding: PoolPadding = "max_length" if pool_padding is True else pool_padding
        self.padding_batch_size = padding_batch_size
        self.backend: Backend = backend
        self.model = model
        self.revision = revision
        self.document_entry = document_entry.checked(
            columns=vocabulary.columns,
            positions=document_tower.body.config.max_length,
            special=tokenizer.extra_length,
        )
        self.query_entry = query_entry.checked(
            columns=vocabulary.columns,
            positions=query_tower.body.config.max_length,
            special=tokenizer.extra_length,
        )
        self.truncated = 0
        self.query_graphs = False
        self._graphs: QueryGraphs | None = None
        self._lock = threading.Lock()
        self._digest: tuple[object, str] | None = None

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
        pool_padding: PoolPadding = False,
        padding_batch_size: int = 128,
        backend: Backend = "auto",
        tokenizer: Any = None,
        revision: str | None = None,
    ) -> SparseEncoder:
        """An encoder out of a model folder or from the hub.

        Reads folders of this library, of sentence-transformers sparse encoders, of VDR's published
        code (vsearch), and of Hugging Face masked language models of the BERT, DistilBERT and
        RoBERTa families. What no option says, the folder does.

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
            pool_padding: Let padding take part in the maximum, as VDR's published code does: it
                reproduces its numbers and is good for nothing else. A vector then depends on how
                its text was padded, each text costs as much as the longest, and pads add
                dimensions that nothing in the text stands for. `"max_length"` (or True) pads to
                the maximal length, as for the published results; `"longest"` pads to the longest
                of each `padding_batch_size` texts in the given order, as later versions do.
            padding_batch_size: Texts in a batch of `"longest"`.
            backend: Of the kernels: `"auto"`, `"reference"`, `"cpu"` or `"triton"`.
            tokenizer: A tokenizer or a folder with one, for folders that hold none.
            revision: Branch, tag or commit on the hub.

        Raises:
            ConfigError: The folder, a file in it, or an option is impossible; the message says
                which and why.
            MissingExtraError: A package of the extra `encode` is not installed.
        """
        from vdr_db.checkpoints.text import LoadOptions, load_encoder

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
            pool_padding=pool_padding,
            padding_batch_size=padding_batch_size,
            backend=backend,
            tokenizer=tokenizer,
            revision=revision,
        )
        return load_encoder(name_or_folder, options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the encoder as a folder that `from_pretrained` reads; all of it or nothing.

        An encoder saved there before is replaced; anything else is left alone. A shared `mlm`
        encoder also opens with `transformers.AutoModelForMaskedLM`.

        Args:
            folder: Where to; made with its parents if need be.

        Raises:
            ConfigError: The place holds something else, or cannot be written.
        """
        from vdr_db.checkpoints.text import save_encoder

        save_encoder(self, folder)

    # What it is

    @property
    def is_shared(self) -> bool:
        """Whether documents and queries go through one tower."""
        return self.document_tower is self.query_tower

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.document_tower.body.embeddings.word.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and the hidden states."""
        return self.document_tower.body.embeddings.word.weight.dtype

    def named_tensors(self) -> dict[str, Tensor]:
        """All weights by our names; those of a shared tower once."""
        towers = {"document": self.document_tower}
        if not self.is_shared:
            towers["query"] = self.query_tower
        return {
            f"{side}.{name}": tensor
            for side, tower in towers.items()
            for name, tensor in tower.named_parameters()
        }

    def stamp(self) -> EncoderStamp:
        """Identity of this encoder, for stores. The first call reads all weights once."""
        return EncoderStamp(
            model=self.model,
            revision=self.revision,
            weights=self.remember_weights(),
            tokenizer=self.vocabulary.fingerprint,
            vocabulary=self.vocabulary.kind,
            head=self.document_tower.head.name,
            activation=self.activation,
            k=self.document_entry.k,
            library_version=__version__,
        )

    def remember_weights(self) -> str:
        """Digest of the weights, computed anew only after one of them was written in place.

        Moving or rounding the towers afterwards does not change it, so an encoder in bfloat16 and
        its float32 original count as one model.
        """
        version = self._weights_version()
        if self._digest is None or self._digest[0] != version:
            self._digest = (version, digest(self.named_tensors()))
        return self._digest[1]

    def __repr__(self) -> str:
        """What it computes and where."""
        k = self.document_entry.k
        return (
            f"SparseEncoder({self.model!r}, head={self.document_tower.head.name!r}, "
            f"activation={self.activation!r}, {self.vocabulary.columns} columns, "
            f"k={'all' if k is None else k}, {self.dtype} on {self.device})"
        )

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
        `pool_padding` it gets what the published code gives it.

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
        tokens = self.tokenizer.encode(checked_texts(texts))
        frame = self.frame("document")
        self._count_truncated(tokens.lengths, frame, stacklevel=3)
        cut = tokens.cut(np.arange(len(tokens.lengths)), frame.own)
        return self.vocabulary.bag_of_tokens(cut.input_ids, cut.cu_seqlens)

    def token_ids(self, text: str) -> list[int]:
        """Own token ids of one text, uncut and without special tokens."""
        return [int(i) for i in self.tokenizer.encode(checked_texts([text])).input_ids]

    def frame(self, side: Side) -> Frame:
        """What stands around a text of one side, `"document"` or `"query"`, and its length."""
        tower = self.document_tower if side == "document" else self.query_tower
        entry = self.document_entry if side == "document" else self.query_entry
        config = tower.body.config
        return Frame(
            prefix=self.tokenizer.prefix_ids,
            suffix=self.tokenizer.suffix_ids,
            pad_id=config.pad_id,
            first_position=config.first_position,
            counts_from_pad=config.first_position > 0,
            max_length=entry.max_length or config.max_length,
        )

    def _encode(
        self, side: Side, texts: Iterable[str], token_budget: int | None, show_progress: bool
    ) -> SparseRows:
        tower = self.document_tower if side == "document" else self.query_tower
        entry = self.document_entry if side == "document" else self.query_entry
        frame = self.frame(side)
        budget = self._checked_budget(token_budget)
        raw = checked_texts(texts)
        tokens = self.tokenizer.encode([entry.prompt + text for text in raw])
        lengths = tokens.lengths
        self._count_truncated(lengths, frame, stacklevel=4)
        prompt = len(self.tokenizer.encode([entry.prompt]).input_ids) if entry.prompt else 0
        batches, empty = self._plan(side, lengths, prompt, frame, budget)
        parts: list[SparseRows] = []
        order: list[npt.NDArray[np.int64]] = []
        packed = self._packed(tokens, batches, frame)
        with torch.inference_mode(), _evaluating(tower), _progress(len(raw), show_progress) as bar:
            bar.update(empty.size)
            for batch, rows in self._rows_of(side, tower, entry, tokens, packed, frame):
                parts.append(rows)
                order.append(batch.texts)
                bar.update(len(batch.texts))
        parts.append(SparseRows.empty(empty.size, self.vocabulary.size))
        order.append(empty)
        place = np.empty(len(raw), np.int64)
        place[np.concatenate(order)] = np.arange(len(raw))
        return SparseRows.concat(parts)[place]

    def _packed(
        self, tokens: TokenizedTexts, batches: list[npt.NDArray[np.int64]], frame: Frame
    ) -> Iterator[PackedBatch]:
        """The planned batches, each made when it is asked for."""
        padded_to = frame.max_length if self.pool_padding == "max_length" else None
        for chosen in batches:
            if self.pool_padding == "longest":
                own = np.minimum(tokens.lengths[chosen], frame.own)
                padded_to = int(own.max()) + self.tokenizer.extra_length
            yield pack(tokens, chosen, frame, padded_to=padded_to)

    def _rows_of(
        self,
        side: Side,
        tower: Tower,
        entry: Entry,
        tokens: TokenizedTexts,
        batches: Iterable[PackedBatch],
        frame: Frame,
    ) -> Iterator[tuple[PackedBatch, SparseRows]]:
        """Batches with their rows, in order: one by one, or overlapping on a GPU."""
        queue = self._queue()
        if queue is None:
            for batch in batches:
                yield batch, self._encode_batch(tower, entry, tokens, batch, frame)
            return
        graphs = self._graphs_of(side, tower, entry, frame)

        def score(batch: PackedBatch) -> Outcome:
            size = None if graphs is None else graphs.size_of(batch, queue.device)
            if graphs is not None and size is not None:
                return graphs.score(batch, size, queue)
            return score_batch(
                tower,
                batch,
                queue,
                k=entry.k,
                activation=self.activation,
                norm=self.norm,
                lexical=self._own_tokens(tokens, batch, frame),
                vocabulary=self.vocabulary,
                backend=self.backend,
            )

        yield from encode_batches(batches, score, queue, self.vocabulary)

    def _queue(self) -> DeviceQueue | None:
        """Where batches may overlap; None where they run one by one."""
        return DeviceQueue(self.device) if self.device.type == "cuda" else None

    def _graphs_of(
        self, side: Side, tower: Tower, entry: Entry, frame: Frame
    ) -> QueryGraphs | None:
        if side != "query" or not self.query_graphs or self.lexical:
            return None
        options = (entry.k, self.activation, self.norm, self.backend)
        if self._graphs is None or not self._graphs.is_for(tower, options):
            self._graphs = QueryGraphs(tower, options, (frame.pad_id, frame.first_position))
        return self._graphs

    def _own_tokens(
        self, tokens: TokenizedTexts, batch: PackedBatch, frame: Frame
    ) -> SparseRows | None:
        if not self.lexical:
            return None
        cut = tokens.cut(batch.texts, frame.own)
        return self.vocabulary.bag_of_tokens(cut.input_ids, cut.cu_seqlens)

    def _encode_batch(
        self, tower: Tower, entry: Entry, tokens: TokenizedTexts, batch: PackedBatch, frame: Frame
    ) -> SparseRows:
        device = self.device
        pooled = tower(
            torch.from_numpy(batch.input_ids).to(device, non_blocking=True),
            torch.from_numpy(batch.position_ids).to(device, non_blocking=True),
            torch.from_numpy(batch.cu_seqlens).to(device, non_blocking=True),
            batch.runs,
            backend=self.backend,
        )
        return to_sparse_rows(
            pooled.logits[: len(batch.texts)],
            self.vocabulary,
            k=entry.k,
            activation=self.activation,
            norm=self.norm,
            lexical=self._own_tokens(tokens, batch, frame),
            backend=self.backend,
            name=lambda row: f"text {int(batch.texts[row])}",
        )

    def _plan(
        self,
        side: Side,
        lengths: npt.NDArray[np.int64],
        prompt: int,
        frame: Frame,
        budget: int,
    ) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
        """Batches of texts, and the texts that need none because they get an empty row."""
        rows = max(1, POOLED_BYTES // (4 * self.vocabulary.columns))
        tower = self.document_tower if side == "document" else self.query_tower
        if self.device.type == "cpu" and not packing_is_exact(tower.body.config, self.dtype):
            rows = 1
        if self.pool_padding == "longest":
            return upstream_batches(lengths, self.padding_batch_size), np.zeros(0, np.int64)
        extra = self.tokenizer.extra_length
        if self.pool_padding == "max_length":
            cost = np.full_like(lengths, frame.max_length)
            return plan_batches(cost, tokens=budget, rows=rows), np.zeros(0, np.int64)
        full = np.flatnonzero(lengths > prompt)
        cost = np.minimum(lengths[full], frame.own) + extra
        batches = plan_batches(cost, tokens=budget, rows=rows)
        return [full[batch] for batch in batches], np.flatnonzero(lengths <= prompt)

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
            warnings.warn(
                f"{count} texts are longer than {frame.max_length} tokens and were cut; this is "
                "said once, `encoder.truncated` keeps the count. Split long texts, or raise "
                "`max_length` if the model allows.",
                stacklevel=stacklevel,
            )

    def _checked_budget(self, token_budget: int | None) -> int:
        if token_budget is None:
            return TOKEN_BUDGET.get(self.device.type, TOKEN_BUDGET_ELSEWHERE)
        if isinstance(token_budget, bool) or not isinstance(token_budget, int) or token_budget < 1:
            raise ConfigError(f"`token_budget` must be at least 1, got {token_budget!r}.")
        return token_budget

    def _weights_version(self) -> object:
        """Something that changes whenever a weight is replaced or written in place."""
        towers = (self.document_tower, self.query_tower)
        return [(id(p), p._version) for tower in towers for p in tower.parameters()]


@contextmanager
def _evaluating(tower: Tower) -> Iterator[None]:
    """Without dropout, even in the middle of a training run."""
    if not tower.training:  # walking all modules takes longer than a small model takes for a query
        yield
        return
    tower.eval()
    try:
        yield
    finally:
        tower.train()


def _progress(total: int, shown: bool) -> tqdm[Any]:
    from tqdm import tqdm

    return tqdm(total=total, unit="text", disable=not shown, desc="encode")
