"""Training-time vectors of texts: dense, gated, bags of tokens, or the dense CLS state.

The same packed path as `SparseEncoder` at inference, with gradients. A side that is only used gated
never gets a `[B, V]` gradient: its columns are selected without one, and only the entries that were
kept have it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vdr_db.encoders.batching import Frame, pack
from vdr_db.encoders.text import SparseEncoder
from vdr_db.kernels import Activation, Pooled, gather_kept, project_pool
from vdr_db.text.tokenization import TokenizedTexts
from vdr_db.towers.text import Tower
from vdr_db.training.sampled_lengths import draw_columns, scaled_to_unit
from vdr_db.training.sparse_ops import GatedRows, gate, pick_logits, weigh, winning_tokens

__all__ = ["Need", "Side", "Vectors", "known"]

Need = Literal["dense", "gated", "bags", "cls"]
_Row = TypeVar("_Row", GatedRows, Tensor)


@dataclass(frozen=True)
class _Given:
    """What the kernels take of a batch: `[R, H]`, `[B + 1]`, `[V, H]`, `[V]`, longest text."""

    hidden: Tensor
    bounds: Tensor
    weight: Tensor
    bias: Tensor | None
    longest: int | None


@dataclass(frozen=True)
class Vectors:
    """Vectors of B texts; what was not asked for is None.

    Attributes:
        dense: `[B, V]` float, weights of all columns.
        gated: The kept columns of the same.
        bags: The texts' own columns with weight 1, without gradient.
        cls: `[B, H]` float, hidden state of the first token.
    """

    dense: Tensor | None = None
    gated: GatedRows | None = None
    bags: GatedRows | None = None
    cls: Tensor | None = None

    def __len__(self) -> int:
        """B."""
        return self.leaves()[0].shape[0] if self.gated is None else len(self.gated)

    def leaves(self) -> list[Tensor]:
        """The tensors that carry a gradient, in one order."""
        gated = None if self.gated is None else self.gated.weights
        return [tensor for tensor in (self.dense, gated, self.cls) if tensor is not None]

    def detached(self) -> Vectors:
        """The same numbers as new leaves that collect gradients."""

        def leaf(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().requires_grad_()

        gated = self.gated
        if gated is not None:
            gated = replace(gated, weights=gated.weights.detach().requires_grad_())
        return Vectors(leaf(self.dense), gated, self.bags, leaf(self.cls))

    @staticmethod
    def concat(parts: list[Vectors]) -> Vectors:
        """Texts of all parts, in order, with their gradients."""

        def stacked(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors)

        def joined(name: str) -> GatedRows | None:
            rows = [getattr(part, name) for part in parts]
            return None if rows[0] is None else GatedRows.concat(rows)

        return Vectors(stacked("dense"), joined("gated"), joined("bags"), stacked("cls"))


def known(vectors: _Row | None) -> _Row:
    """Vectors that were asked for, and so are there."""
    assert vectors is not None, "other vectors are used than were asked for"
    return vectors


@dataclass(frozen=True)
class Side:
    """How one side, queries or documents, becomes vectors in training.

    Attributes:
        tower: Body and head.
        frame: Special tokens around a text, and its maximal length.
        k: Columns a gated row keeps; None for all.
        lexical: Whether a gated row also keeps the text's own columns.
        activation: Turns logits into weights.
        encoder: Whose vocabulary and tokenizer are used.
    """

    tower: Tower
    frame: Frame
    k: int | None
    lexical: bool
    activation: Activation
    encoder: SparseEncoder

    @classmethod
    def of(
        cls, encoder: SparseEncoder, side: Literal["query", "document"], *, lexical: bool
    ) -> Side:
        """A side as the encoder has it set up: its tower, maximal length and k."""
        is_query = side == "query"
        tower = encoder.query_tower if is_query else encoder.document_tower
        entry = encoder.query_entry if is_query else encoder.document_entry
        return cls(tower, encoder.frame(side), entry.k, lexical, encoder.activation, encoder)

    def encode(
        self,
        tokens: TokenizedTexts,
        chosen: npt.NDArray[np.int64],
        needs: set[Need],
        also: GatedRows | None = None,
        *,
        unit_sample: int = 0,
    ) -> Vectors:
        """Vectors of chosen texts, in that order.

        Args:
            tokens: Own tokens of texts.
            chosen: `[B]` numbers of texts, each at most once.
            needs: What to compute.
            also: B rows whose columns gated rows keep in any case; their weights do not count.
            unit_sample: If not 0, gated rows without `dense` are scaled to length 1 over all
                columns; from that many drawn ones their length's gradient is estimated.
        """
        bags = self._bags(tokens, chosen)
        forced = [rows for rows in (bags if self.lexical else None, also) if rows is not None]
        kept = GatedRows.union(forced) if forced and "gated" in needs else None
        if needs <= {"bags"}:
            return Vectors(bags=bags)
        batch = pack(tokens, chosen, self.frame)
        device = self.encoder.device
        place = {int(text): row for row, text in enumerate(batch.texts)}
        rows = torch.tensor([place[int(text)] for text in chosen], device=device)
        bounds = torch.from_numpy(batch.cu_seqlens).to(device, non_blocking=True)
        input_ids = torch.from_numpy(batch.input_ids).to(device, non_blocking=True)
        hidden = self.tower.body(
            input_ids,
            torch.from_numpy(batch.position_ids).to(device, non_blocking=True),
            batch.runs,
        )
        cls = hidden[bounds[:-1].long()[rows]].float() if "cls" in needs else None
        dense = gated = None
        if needs & {"dense", "gated"}:
            head, words = self.tower.head, self.tower.body.embeddings.word.weight
            states, places = head.read(hidden, bounds)
            given = _Given(
                _widened(states),
                places,
                head.matrix(words),
                head.bias_rows(),
                # of the batch, not of the frame: rows that only fill up may be longer
                max((run.length for run in batch.runs), default=None),
            )
            if "dense" in needs:
                dense, gated = self._dense(given, rows, kept, needs)
            else:
                gated = self._gated(given, rows, kept, unit_sample)
        return Vectors(dense, gated, bags if "bags" in needs else None, cls)

    def _dense(
        self, given: _Given, rows: Tensor, forced: GatedRows | None, needs: set[Need]
    ) -> tuple[Tensor, GatedRows | None]:
        logits = self._pooled(given).logits[rows]
        dense = weigh(logits, self.activation)
        if "gated" not in needs:
            return dense, None
        kept = self._select(logits.detach(), forced)
        return dense, replace(kept, weights=dense[kept.rows, kept.columns])

    def _gated(
        self, given: _Given, rows: Tensor, forced: GatedRows | None, unit_sample: int
    ) -> GatedRows:
        has_positions = _gives_positions(given.hidden.device)
        pick = self._picked_with_positions if has_positions else self._picked_by_tokens
        picked, logits = pick(given, rows, forced)
        kept = replace(picked, weights=weigh(picked.weights, self.activation))
        if not unit_sample:
            return kept
        columns = draw_columns(logits.shape[1], unit_sample, logits.device)
        bias = None if given.bias is None else given.bias[columns]
        some = replace(given, weight=given.weight[columns], bias=bias)
        drawn = self._pooled(some).logits[rows]
        weights = weigh(logits, self.activation)
        return scaled_to_unit(kept, weights, weigh(drawn, self.activation), columns)

    def _picked_with_positions(
        self, given: _Given, rows: Tensor, forced: GatedRows | None
    ) -> tuple[GatedRows, Tensor]:
        """Logits of kept entries, and of all `[B, V]` without gradient, by the kernels alone.

        Their gradient sums the entries of a token or column in one place: no atomics.
        """
        with torch.no_grad():
            pooled = self._pooled(given, return_argmax=True)
            # Positions belong to texts in packed order.
            place = torch.empty_like(rows)
            place[rows] = torch.arange(len(rows), device=rows.device)
            packed = None if forced is None else forced.reordered(place)
            kept = self._select(pooled.logits[: len(rows)], packed)
            # What only fills up a batch comes last and keeps nothing.
            filling = kept.indptr[-1:].expand(pooled.logits.shape[0] - len(rows))
            indptr = torch.cat([kept.indptr, filling])
        values = gather_kept(
            *(pooled, indptr, kept.columns, given.hidden, given.bounds, given.weight, given.bias),
            backend=self.encoder.backend,
        )
        return replace(kept, weights=values).reordered(rows), pooled.logits[rows]

    def _picked_by_tokens(
        self, given: _Given, rows: Tensor, forced: GatedRows | None
    ) -> tuple[GatedRows, Tensor]:
        """The same where positions of all V columns would cost as much as the maxima."""
        hidden, weight = given.hidden, given.weight
        with torch.no_grad():
            logits = self._pooled(given).logits[rows]
            kept = self._select(logits, forced)
            spans = torch.stack([given.bounds[:-1], given.bounds[1:]], dim=1).long()[rows]
            tokens = winning_tokens(hidden, spans, weight, kept.indptr, kept.columns)
        picked = pick_logits(hidden, weight, given.bias, tokens, kept.columns)
        return replace(kept, weights=picked), logits

    def _pooled(self, given: _Given, *, return_argmax: bool = False) -> Pooled:
        return project_pool(
            *(given.hidden, given.bounds, given.weight, given.bias),
            return_argmax=return_argmax,
            max_length=given.longest,
            backend=self.encoder.backend,
        )

    def _select(self, logits: Tensor, forced: GatedRows | None) -> GatedRows:
        lexical = None if forced is None else (forced.indptr, forced.columns)
        chosen = gate(logits, self.k, lexical=lexical)
        return GatedRows(chosen.indptr, chosen.columns.long(), chosen.weights, logits.shape[1])

    def _bags(self, tokens: TokenizedTexts, chosen: npt.NDArray[np.int64]) -> GatedRows:
        vocabulary = self.encoder.vocabulary
        own = np.minimum(tokens.lengths[chosen], self.frame.own)
        bounds = np.concatenate([[0], np.cumsum(own)])
        source = np.repeat(tokens.cu_seqlens[chosen] - bounds[:-1], own) + np.arange(bounds[-1])
        rows = vocabulary.bag_of_tokens(tokens.input_ids[source], bounds)
        columns = vocabulary.id_to_column[rows.indices].astype(np.int64)
        device = self.encoder.device
        return GatedRows(
            torch.tensor(rows.indptr, device=device),
            torch.tensor(columns, device=device),
            torch.tensor(rows.values, device=device),
            vocabulary.columns,
        )


def _gives_positions(device: torch.device) -> bool:
    """Whether maxima come with their positions at no cost; a CPU computes those in extra passes."""
    return device.type != "cpu"


def _widened(hidden: Tensor) -> Tensor:
    """Hidden states as the kernels want them: a CPU without bfloat16 units is faster in float32."""
    return hidden.float() if hidden.device.type == "cpu" and hidden.dtype.itemsize < 4 else hidden
