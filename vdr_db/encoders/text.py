"""`SparseEncoder`: texts to sparse vectors over token ids.

    texts -> token ids [T] -> hidden states [T, H] -> pooled scores [B, V] -> `SparseRows`

Packed all the way: no padding in the body, and never `[B, L, V]` in the head.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vdr_db.checkpoints.folders import understood
from vdr_db.checkpoints.graphs import Runtime, trainable
from vdr_db.checkpoints.plan import (
    Compatibility,
    Entry,
    FromCheckpoint,
    Padding,
    compatibility_of,
)
from vdr_db.checkpoints.precision import checked_precision
from vdr_db.checkpoints.sides import TextTower
from vdr_db.checkpoints.weights import Weight, named_weights
from vdr_db.encoders.scanning import head_choices
from vdr_db.encoders.sides import TextSide
from vdr_db.encoders.text_encoding import Side, TextEncoding
from vdr_db.errors import ConfigError
from vdr_db.forks import renew_after_fork
from vdr_db.kernels import Activation, Backend
from vdr_db.text.own_weights import OwnWeights
from vdr_db.text.tokenization import AnyTokenizer, TextTokenizer
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.interface import Precision

if TYPE_CHECKING:
    import torch

    from vdr_db.checkpoints.export import Card
    from vdr_db.encoders.text_cuda import QueryGraphs
    from vdr_db.towers.static import StaticTower
    from vdr_db.towers.text import Tower

__all__ = ["Side", "SparseEncoder"]


class SparseEncoder(TextEncoding):
    """Texts to sparse vectors, one tower for documents and one for queries, often the same.

    Get one with `SparseEncoder.from_pretrained`. A text's vector depends on that text alone: alone,
    in a batch or shuffled, its bits are the same on one device, dtype and backend on the CPU. A GPU
    picks its matrix kernels by batch size, so there it holds up to rounding.

    Encoding is safe from several threads at once, as long as nobody trains or changes the encoder
    meanwhile; threads share torch's pool of workers, so they do not make it faster.

    Attributes:
        vocabulary: Column, id and text of every token.
        tokenizer: The tokenizer of both towers.
        activation: Turns scores into weights.
        document_entry: Maximal length, k and prompt of documents.
        query_entry: Maximal length, k and prompt of queries.
        lexical: Whether a text's own tokens are always kept.
        own_weights: What a text's own tokens weigh besides the model's weights; None for nothing.
        compatibility: How VDR's published code pads, see `from_pretrained`; None for no padding.
        truncated: How many texts were cut to the maximal length so far.
        query_graphs: Whether small batches of queries are replayed as CUDA graphs; off unless set.
            It saves launches where a query takes about a millisecond, on a GPU in float16 or
            bfloat16, and holds up to 256 MB there. Not together with `lexical` or
            `own_weights`.
    """

    def __init__(
        self,
        *,
        document_tower: TextTower,
        query_tower: TextTower,
        tokenizer: TextTokenizer,
        vocabulary: Vocabulary,
        activation: Activation,
        document_entry: Entry,
        query_entry: Entry,
        norm: bool = False,
        lexical: bool = False,
        own_weights: OwnWeights | None = None,
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
            own_weights: Added to the model's weights before the k largest are chosen.
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
        self._towers = {"document": document_tower, "query": query_tower}
        self.lexical = lexical
        self.own_weights = own_weights
        if own_weights is not None:
            self._check_own_weights(own_weights, query_gate)
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
        self._choices = head_choices()
        self._lock = threading.Lock()
        renew_after_fork(self)
        self._know_weights(digest)

    def __getstate__(self) -> dict[str, Any]:
        # A lock, captured graphs and measured times are of one process and one machine.
        return {**self.__dict__, "_lock": None, "_graphs": None, "_choices": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _choices=head_choices())
        renew_after_fork(self)

    def after_fork(self) -> None:
        """A lock that a thread of the parent held is held for ever here."""
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        precision: Precision = "float32",
        dtype: str | torch.dtype | None = None,
        k: int | FromCheckpoint | None = "checkpoint",
        query_k: int | FromCheckpoint | None = "checkpoint",
        max_length: int | None = None,
        query_max_length: int | None = None,
        lexical: bool | None = None,
        own_weights: OwnWeights | Literal[False] | None = None,
        activation: Activation | None = None,
        head: str | None = None,
        vocabulary: str | None = None,
        compatibility: Compatibility | Padding | None = None,
        backend: Backend = "auto",
        tokenizer: AnyTokenizer | None = None,
        special_tokens_as_text: bool | None = None,
        revision: str | None = None,
        runtime: Runtime = "auto",
        threads: int | None = None,
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
            precision: In which the body computes; docs/models.md says what each costs and saves.
                `"int8"` rounds what its linear layers multiply, and runs on ONNX Runtime;
                `"bfloat16"` rounds weights and states, and runs on OpenVINO where that is installed
                and the folder has graphs, else on torch. Products with the vocabulary are float32
                in any case.
            dtype: Of weights and hidden states on torch: `"float16"` or `"float64"`. Other values
                are older names of a `precision`.
            k: Dimensions kept per text; None keeps all that have a weight. The checkpoint says 768
                for VDR, `max_active_dims` for sentence-transformers, and all for other SPLADE
                models.
            query_k: The same for queries only; left alone, it follows `k` where that is given.
            max_length: Most tokens of a text, special tokens included.
            query_max_length: The same for queries only; None follows `max_length` where given.
            lexical: Whether a text's own tokens are kept in addition to the k largest. None means
                as saved, which is off for all published models: their figures were made so.
            own_weights: Weights of a text's own tokens, merged by stem, that are added to the
                model's before the k largest are chosen; see `vdr_db.text.own_weights`. None means
                as saved, False without.
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
            backend: Of the kernels: `"auto"`, `"reference"`, `"cpu"`, `"cpu-int8"` or `"triton"`.
                On the CPU, `"auto"` finds the columns that can be kept by a scan in 8 bit integers
                where that is faster, and computes those in fp32: the vectors are the same, bit for
                bit. `"cpu"` never scans, `"cpu-int8"` always.
            tokenizer: A tokenizer or a folder with one, for folders that hold none.
            special_tokens_as_text: Whether `[MASK]` and the like in a text are text to a model too,
                as they are to static sides and to bags of tokens. None means as the folder says,
                which mostly is that they are special, as in sentence-transformers.
            revision: Branch, tag or commit on the hub.
            runtime: `"onnx"` runs the ONNX graphs of the folder on the CPU without torch,
                `"openvino"` too, with bodies by OpenVINO, `"torch"` trains and runs on CUDA, too.
                `"auto"` takes graphs where the folder has some, no option needs torch, and torch
                would not find a GPU.
            threads: Of graphs; None for one a core. torch has a setting of its own.
            pool_padding: Older name of `compatibility`.
            padding_batch_size: Older name of the number in `Compatibility("longest", n)`.

        Raises:
            ConfigError: The folder, a file in it, or an option is impossible; the message says
                which and why.
            MissingExtraError: A package of the extra `torch` is not installed.
        """
        from vdr_db.checkpoints.text import LoadOptions, load_text

        padding = compatibility_of(compatibility, pool_padding, padding_batch_size)
        precision, dtype = checked_precision(precision, dtype)
        options = LoadOptions(
            device=device,
            dtype=dtype,
            precision=precision,
            k=k,
            query_k=query_k,
            max_length=max_length,
            query_max_length=query_max_length,
            lexical=lexical,
            own_weights=own_weights,
            activation=activation,
            head=head,
            vocabulary=vocabulary,
            tokenizer=tokenizer,
            special_tokens_as_text=special_tokens_as_text,
            revision=revision,
            runtime=runtime,
            threads=threads,
            needs_torch={
                "`compatibility`": padding is not None,
                "`backend`": backend not in ("auto", "cpu", "cpu-int8"),
            },
        )
        parts = load_text(name_or_folder, options)
        with understood(Path(name_or_folder)):  # of the settings that parts are checked by
            encoder = cls(**vars(parts), compatibility=padding, backend=backend)
        encoder.asked = options.asked()
        return encoder

    def save_pretrained(self, folder: str | os.PathLike[str], *, card: Card | None = None) -> None:
        """Writes the encoder as a folder that `from_pretrained` reads; all of it or nothing.

        An encoder saved there before is replaced; anything else is left alone. It also opens with
        sentence-transformers, with equal vectors; where a head needs a module of ours there, that
        asks for `trust_remote_code=True`. Own weights have no module there, so an encoder with
        them opens here alone.

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

    def _check_own_weights(self, own: OwnWeights, gate: StaticTower | None) -> None:
        if own.canon.size != self.vocabulary.size:
            raise ConfigError(
                f"`own_weights` must have one entry for each of {self.vocabulary.size} tokens, got "
                f"{own.canon.size}; make them for this tokenizer with `OwnWeights.fitted`."
            )
        if self.norm or gate is not None:
            raise ConfigError(
                "`own_weights` must be None for vectors of norm 1 and for gated queries, whose "
                "weights are not what is added to; pass own_weights=False."
            )

    @property
    def is_shared(self) -> bool:
        """Whether documents and queries go through one tower."""
        return self._towers["document"] is self._towers["query"]

    @property
    def document_tower(self) -> Tower:
        """Module for documents.

        Raises:
            ConfigError: ONNX Runtime computes it.
        """
        return trainable(self._towers["document"])

    @document_tower.setter
    def document_tower(self, tower: TextTower) -> None:
        self._towers = {**self._towers, "document": tower}

    @property
    def query_tower(self) -> Tower:
        """Module for queries; the same object when shared.

        Raises:
            ConfigError: ONNX Runtime computes it.
        """
        return trainable(self._towers["query"])

    @query_tower.setter
    def query_tower(self, tower: TextTower) -> None:
        self._towers = {**self._towers, "query": tower}

    def tower(self, side: Side) -> TextTower:
        """Body and head of one side, whichever runtime computes them."""
        return self._towers[side]

    @property
    def _main_tower(self) -> TextTower:
        return self._towers["document"]

    @property
    def _stored_k(self) -> int | None:
        return self.document_entry.k

    def settings(self) -> dict[str, str]:
        """All but the weights that changes a vector, see `EncoderStamp.settings`."""
        from vdr_db.checkpoints.text import TextParts

        towers = {f"{side}_tower": tower for side, tower in self._towers.items()}
        return self._settings(TextParts, compatibility=self.compatibility, **towers)

    def named_weights(self) -> dict[str, Weight]:
        """All weights by our names; those of a shared tower once."""
        return named_weights(self._towers["document"], self._towers["query"], self.own_weights)

    def __repr__(self) -> str:
        """What it computes and where."""
        head = f"head={self._main_tower.head_name!r}"
        return self._described(head, f"activation={self.activation!r}")

    def side(self, side: Side) -> TextSide:
        """What makes vectors of the texts of one side, `"document"` or `"query"`."""
        tower = self._towers[side]
        if side == "document":
            return TextSide(tower, self.document_entry, self.tokenizer, self.activation)
        return TextSide(
            tower,
            self.query_entry,
            self.query_tokenizer or self.tokenizer,
            self.query_activation or self.activation,
            self.query_gate,
        )
