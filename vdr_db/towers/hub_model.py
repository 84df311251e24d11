"""Towers whose body and head are a masked language model, or a decoder, of transformers.

The model's last linear layer is left out, and its weights go to `project_pool`, which never holds
`[T, V]`. Bodies that ask for their attention by name run on packed rows (`packed_attention`); all
others run on texts padded to a multiple of 16 that follows from each text alone. Which of the two
is right is tried when a tower is made: both must give what the model gives on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vdr_db.errors import ConfigError
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.packed_attention import NAME, NotPackable, PackedTexts, register
from vdr_db.towers.packing import ROW_MULTIPLE, Run
from vdr_db.towers.text_body import (
    ACTIVATIONS,
    Padding,
    Ragged,
    ragged_attention,
    rows_are_independent,
)
from vdr_db.towers.text_head import Head
from vdr_db.towers.torch_text import ProjectedTower
from vdr_db.towers.torch_tower import check_process
from vdr_db.warning import warn_caller

__all__ = ["HubModelTower", "HubSizes"]

TOLERANCE = 2e-4
"""Largest difference of a score from the model's own when a tower is tried, relative above 1."""

_WINDOW_TRIED, _SHORT_WINDOW = 256, 16  # a longer window of attention is shortened for the trial
_TRIAL_LENGTH = 24
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class HubSizes:
    """Sizes of a model of transformers, by the names that bodies of this library give them.

    Attributes:
        family: Its `model_type`.
        vocab_size: Rows of its vocabulary matrix.
        hidden_size: Width of what goes into that matrix.
        max_length: Most tokens it has positions for.
        pad_id: Token id of padding.
        first_position: Position number of the first token.
    """

    family: str
    vocab_size: int
    hidden_size: int
    max_length: int
    pad_id: int
    first_position: int


class _OutputHead(Head):
    """The last linear layer of a model, which is not a part of this module: the model owns it."""

    name = "mlm"

    def __init__(self, output: nn.Linear, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.__dict__["output"] = output

    def transform(self, hidden: Tensor) -> Tensor:
        """Nothing is left to do."""
        return hidden

    def matrix(self, word_embeddings: Tensor) -> Tensor:
        """Rows of the vocabulary matrix, `[V, H]`."""
        weight: Tensor = self.__dict__["output"].weight
        return self._rows(weight)

    def bias_rows(self) -> Tensor | None:
        """Bias of the kept columns, `[V]`, or None."""
        bias: Tensor | None = self.__dict__["output"].bias
        return None if bias is None else self._chosen(bias)


class _PassThrough:
    """In the place of the last layer's forward; an object, so that models can be copied."""

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden


class HubModelTower(ProjectedTower):
    """A model of transformers as a tower.

    Attributes:
        model: The model; its last linear layer hands its input through.
        head: Its vocabulary matrix.
        packs: Whether texts run packed; padded where not.
        is_decoder: Whether the model is a decoder.
    """

    is_decoder = False

    def __init__(self, model: nn.Module, vocabulary: Vocabulary, *, max_length: int | None) -> None:
        """Takes a model over and tries how its texts can run.

        Args:
            model: A masked language model or a decoder, float32 on the CPU, in evaluation.
            vocabulary: Which columns are computed.
            max_length: Most tokens of a text, where the model names no limit.

        Raises:
            ConfigError: Its end is no linear layer, has too few rows, or more stands behind it.
        """
        super().__init__()
        self.model: Any
        output = getattr(model, "get_output_embeddings", lambda: None)()
        if not isinstance(output, nn.Linear):
            raise ConfigError(
                "the model must end in a linear vocabulary projection, got "
                f"{type(model).__name__} with {type(output).__name__}; take its masked language "
                "model."
            )
        self.model = model
        self._sizes = _sizes(model, output, max_length)
        if self.config.vocab_size < vocabulary.size:
            raise ConfigError(
                f"the model must have a row for each of the tokenizer's {vocabulary.size} ids, "
                f"got {self.config.vocab_size} rows; tokenizer and model do not belong together."
            )
        self.head = _OutputHead(output, vocabulary)
        _replace_activations(model)
        self._takes_positions = "position_ids" in signature(model.forward).parameters
        self.packs = False
        texts, short = _trial_texts(self.config, self._window())
        with self._evaluated(short):
            expected = [self._own_scores(text) for text in texts]
            output.__dict__["forward"] = _PassThrough()
            self.packs = self._agrees(texts, expected, packed=True)
            if not self.packs:
                if not self._agrees(texts, expected, packed=False):
                    raise ConfigError(
                        f"{type(model).__name__} does more behind its last linear layer than a "
                        "product with the vocabulary, which no vector here would have; use "
                        "sentence-transformers for it."
                    )
                warn_caller(
                    f"{type(model).__name__} cannot run on packed texts, so they are padded: "
                    "vectors are right, encoding is slower."
                )

    @property
    def config(self) -> HubSizes:
        """Its sizes."""
        return self._sizes

    @property
    def head_name(self) -> str:
        """Name of the head."""
        return self.head.name

    @property
    def body(self) -> Any:
        """Refused: only bodies of this library are trained.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "only BERT, DistilBERT and RoBERTa bodies are trained here, got a "
            f"{self.config.family}; train it with sentence-transformers and `accelerate` of "
            "vdr_db.integrations.sentence_transformers."
        )

    @property
    def constants(self) -> dict[str, Any]:
        """What the model has beside weights and sizes, as JSON types."""
        return {"is_decoder": self.is_decoder, **self.model.config.to_diff_dict()}

    @property
    def packs_exactly(self) -> bool:
        """Whether a text has the same bits in any batch; where it has not, texts go one by one."""
        if _rope_depends_on_batch(self.model.config):
            return False
        if self.device.type != "cpu":
            return True
        check_process()
        widths = {part.in_features for part in self.modules() if isinstance(part, nn.Linear)}
        threads = torch.get_num_threads()
        return _elementwise_is_exact(threads) and all(
            rows_are_independent(width, self.dtype, threads) for width in widths
        )

    def save_model(self, folder: Path) -> None:
        """Writes the model as transformers does."""
        self._attention(None)
        self.model.save_pretrained(folder)

    def matrix(self) -> Tensor:
        """The vocabulary matrix, `[V, H]`."""
        return self.head.matrix(torch.empty(0))

    def bias_rows(self) -> Tensor | None:
        """What is added to the score of each column, `[V]`, or None."""
        return self.head.bias_rows()

    def packed_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        runs: Sequence[Run],
        *,
        layout: Padding | Ragged | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States of all tokens, `[T, H]`, and `cu_seqlens`; see `ProjectedTower`.

        Raises:
            ConfigError: Padding is to take part, as in a compatibility mode of VDR.
        """
        if any(run.kept < run.length for run in runs):
            raise ConfigError(
                "`compatibility` must be None for a model of transformers, whose padding never "
                "takes part in a maximum."
            )
        if layout is None and self.packs:
            layout = self._layout(runs, cu_seqlens)
        return self._hidden(input_ids, position_ids, runs, layout), cu_seqlens

    def _layout(self, runs: Sequence[Run], cu_seqlens: Tensor) -> Padding | Ragged | None:
        device = cu_seqlens.device
        if device.type == "cpu" or len(runs) <= 1:
            return None
        heads = getattr(self.model.config, "num_attention_heads", 0)
        size = getattr(self.model.config, "head_dim", None)
        size = size or (self.model.config.hidden_size // heads if heads else 0)
        if size and ragged_attention(device, self.dtype, size) is not None:
            return Ragged(cu_seqlens, max(run.length for run in runs))
        return Padding.of(runs, device)

    def _hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        runs: Sequence[Run],
        layout: Padding | Ragged | None,
    ) -> Tensor:
        """States `[T, H]` that the vocabulary matrix is multiplied with."""
        if not self.packs:
            return self._padded(ids, runs)
        extra = {"position_ids": positions[None]} if self._takes_positions else {}
        self._attention(NAME)
        found = self.model(input_ids=ids[None], packed=PackedTexts(runs, layout), **extra)
        return found.logits[0]  # type: ignore[no-any-return]

    def _padded(self, ids: Tensor, runs: Sequence[Run]) -> Tensor:
        """The same through padding: each text to the next multiple of 16, or the longest there is.

        Rows of a batch of such texts are whole multiples of 16, so bits depend on no neighbour.
        """
        self._attention(None)
        lengths = [length for run in runs for length in [run.length] * run.count]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        most = self.config.max_length
        widths = np.array([min(n + -n % ROW_MULTIPLE, max(n, most)) for n in lengths], np.int64)
        rows: list[Tensor | None] = [None] * len(lengths)
        for width in np.unique(widths).tolist():
            chosen = np.flatnonzero(widths == width).tolist()
            # without a whole multiple each text is on its own
            groups = [chosen] if width % ROW_MULTIPLE == 0 else [[one] for one in chosen]
            for group in groups:
                padded = ids.new_full((len(group), width), self.config.pad_id)
                seen = torch.zeros_like(padded)
                for row, text in enumerate(group):
                    padded[row, : lengths[text]] = ids[starts[text] : starts[text + 1]]
                    seen[row, : lengths[text]] = 1
                states = self.model(input_ids=padded, attention_mask=seen).logits
                for row, text in enumerate(group):
                    rows[text] = states[row, : lengths[text]]
        return torch.cat([row for row in rows if row is not None])

    def _attention(self, name: str | None) -> None:
        """Which attention the model's layers ask for; None for its usual one."""
        wanted = name or self.__dict__.setdefault("_usual", self.model.config._attn_implementation)
        if name is not None:
            self.__dict__.setdefault("_usual", self.model.config._attn_implementation)
            register()
        for part in self.__dict__.setdefault("_configs", _configs(self.model)):
            if part._attn_implementation != wanted:
                part._attn_implementation = wanted

    def _own_scores(self, ids: Tensor) -> Tensor:
        """Scores of one text as the model itself computes them, `[V]`."""
        self._attention(None)
        seen = torch.ones_like(ids)
        logits = self.model(input_ids=ids[None], attention_mask=seen[None]).logits[0]
        return logits.amax(0)  # type: ignore[no-any-return]

    def _agrees(self, texts: list[Tensor], expected: list[Tensor], *, packed: bool) -> bool:
        """Whether texts in one batch get the scores the model gives each alone."""
        self.packs = packed
        lengths = [len(text) for text in texts]
        rest = -sum(lengths) % ROW_MULTIPLE
        ids = torch.cat([*texts, texts[0].new_full((rest,), self.config.pad_id)])
        bounds = torch.tensor([0, *np.cumsum([*lengths, rest][: len(lengths) + bool(rest)])])
        steps = [*lengths, rest] if rest else lengths
        first = self.config.first_position
        positions = torch.cat([torch.arange(first, first + length) for length in steps])
        runs, start = [], 0
        for length in steps:
            runs.append(Run(start, 1, length, length))
            start += length
        try:
            hidden = self._hidden(ids, positions.clamp_max(first + max(lengths) - 1), runs, None)
        except (NotPackable, TypeError, RuntimeError, ValueError, IndexError):
            if packed:
                return False
            raise
        output = self.head.__dict__["output"]
        for i, wanted in enumerate(expected):
            scores = nn.functional.linear(hidden[bounds[i] : bounds[i + 1]], output.weight)
            found = scores.amax(0) if output.bias is None else scores.amax(0) + output.bias
            gap = (found - wanted).abs() / wanted.abs().clamp_min(1)
            if not float(gap.max()) <= TOLERANCE:
                return False
        return True

    def _window(self) -> int | None:
        window = getattr(self.model.config, "sliding_window", None)
        return window if isinstance(window, int) and window > 0 else None

    @contextmanager
    def _evaluated(self, short: bool) -> Iterator[None]:
        """Without gradients, and with a shorter window where the real one is too long to try."""
        window = self._window()
        holders: list[Any] = [self.model.config, *self.model.modules()] if short and window else []
        changed: list[tuple[Any, int]] = []
        for holder in holders:
            own = getattr(holder, "sliding_window", None)
            if isinstance(own, int) and own >= (window or 0):
                changed.append((holder, own))
                holder.sliding_window = own - (window or 0) + _SHORT_WINDOW
        try:
            with torch.inference_mode():
                yield
        finally:
            for holder, own in changed:
                holder.sliding_window = own


def _sizes(model: Any, output: nn.Linear, max_length: int | None) -> HubSizes:
    config = model.config
    first = 0
    for part in model.modules():
        table = getattr(part, "position_embeddings", None)
        padding = getattr(part, "padding_idx", None)
        if isinstance(table, nn.Embedding) and isinstance(padding, int):
            first = padding + 1
    positions = getattr(config, "max_position_embeddings", None) or max_length or 512
    pad = getattr(config, "pad_token_id", None)
    return HubSizes(
        family=str(config.model_type),
        vocab_size=output.weight.shape[0],
        hidden_size=output.weight.shape[1],
        max_length=int(positions) - first,
        pad_id=pad if isinstance(pad, int) and 0 <= pad < output.weight.shape[0] else 0,
        first_position=first,
    )


def _configs(model: nn.Module) -> list[Any]:
    """Every config that a part of the model asks for its attention, each once."""
    configs: list[Any] = [getattr(part, "config", None) for part in model.modules()]
    found = {id(config): config for config in configs if hasattr(config, "_attn_implementation")}
    return list(found.values())


def _trial_texts(sizes: HubSizes, window: int | None) -> tuple[list[Tensor], bool]:
    """Two texts of random ids, the second longer than the window; and whether that is shortened."""
    short = window is not None and window > _WINDOW_TRIED
    reach = _SHORT_WINDOW if short else window or 0
    lengths = (min(7, sizes.max_length), min(2 * reach + _TRIAL_LENGTH, sizes.max_length))
    generator = torch.Generator().manual_seed(0)
    texts = []
    for length in lengths:
        ids = torch.randint(0, sizes.vocab_size - 1, (length,), generator=generator)
        texts.append(torch.where(ids >= sizes.pad_id, ids + 1, ids))  # padding is no token
    return texts, short


def _replace_activations(model: nn.Module) -> None:
    """Activations whose bits depend on the size of a batch, by those of this library."""
    from transformers import activations

    exact = {
        nn.SiLU: "silu",
        activations.SiLUActivation: "silu",
        activations.NewGELUActivation: "gelu_new",
        activations.GELUTanh: "gelu_pytorch_tanh",
    }
    for part in list(model.modules()):
        name = exact.get(type(part))
        if name is not None:
            part.__dict__["forward"] = ACTIVATIONS[name]


def _rope_depends_on_batch(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    kinds = {part.get("rope_type", part.get("type")) for part in parts}
    return not kinds.isdisjoint(_BATCH_DEPENDENT_ROPE)


@lru_cache(maxsize=8)
def _elementwise_is_exact(_threads: int) -> bool:
    """Whether sines have the same bits however many there are, as rotary positions need."""
    x = torch.linspace(0, 500, 1 << 18).view(4096, 64)
    with torch.inference_mode():
        return all(
            torch.equal(function(x)[:4000:16], function(x[:4000:16].clone()))
            for function in (torch.cos, torch.sin)
        )
