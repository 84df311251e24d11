"""Training-time vectors of texts and images in cross-modal training.

    V(text)     norm(elu1p(pooled logits)), then its k largest columns and its own tokens
    BoW(text)   norm(the set of its tokens)
    V(image)  norm(elu1p(max over patches of states . matrix))       all columns
    heads       norm(linear(CLS state)), norm(linear(mean over patches of states))
    matrix      norm((V(text) + BoW(text)) . matrix), norm(mean over patches of states)

`norm` scales to L2 norm 1 over all columns, before any are left out. Of an encoder with own weights
V(text) is norm(its query), and norm(its document) stands in the place of BoW(text): own words weigh
so much in queries that their bag says little else.

Source: Zhou et al., "Retrieval-based Disentangled Representation Learning with Natural Language
Supervision", ICLR 2024, for the sparse vectors; Radford et al., "Learning Transferable Visual
Models From Natural Language Supervision", ICML 2021, for the dense ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdr_db.encoders.cross_modal import CrossModalEncoder
from vdr_db.encoders.selection import SMALLEST_NORM
from vdr_db.kernels import project_pool
from vdr_db.sparse import SparseRows
from vdr_db.towers.image_hybrid import HybridBody
from vdr_db.training.image_settings import ImageConfig
from vdr_db.training.images.columns import ColumnSample
from vdr_db.training.images.data import Pair
from vdr_db.training.sparse_ops import GatedRows, weigh
from vdr_db.training.vectors import Need, Side, Vectors, known

__all__ = ["DenseHeads", "ImageSide", "KeptRows", "TextSide", "kept_columns"]

KEPT = 10
"""Vectors that a word must be in to get a row of its own."""


class DenseHeads(nn.Module):
    """What makes dense vectors of the states of both bodies; used in training only.

    Attributes:
        text: Of the state of the first token.
        image: Of the mean state of the patches.
    """

    text: nn.Parameter
    image: nn.Parameter

    def __init__(self, text_size: int, image_size: int, *, seed: int) -> None:
        """Makes two maps to `text_size` numbers, the same for the same seed."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, size in (("text", text_size), ("image", image_size)):
            drawn = torch.randn(text_size, size, generator=generator) * size**-0.5
            self.register_parameter(name, nn.Parameter(drawn))


class KeptRows:
    """Rows of a projection that are trained while all others stay; used in training only.

    Attributes:
        columns: `[M]` int64, whose rows.
        rows: `[M, H]`, the rows; the projection gets them by `settle`.
    """

    def __init__(self, projection: Tensor, columns: Tensor) -> None:
        """Starts from the rows as they are."""
        self.projection, self.columns = projection, columns
        self.rows = nn.Parameter(projection.detach()[columns].clone())
        self._places = torch.full(projection.shape[:1], -1, device=columns.device)
        self._places[columns] = torch.arange(len(columns), device=columns.device)

    def of(self, columns: Tensor | None) -> Tensor:
        """Rows of some columns of the projection, or of all, with the gradient of those trained."""
        found = self.projection.detach() if columns is None else self.projection.detach()[columns]
        places = self._places if columns is None else self._places[columns]
        (trained,) = torch.nonzero(places >= 0, as_tuple=True)
        return found.index_put((trained,), self.rows[places[trained]])

    def settle(self) -> None:
        """Writes the rows into the projection."""
        with torch.no_grad():
            self.projection[self.columns] = self.rows


class TextSide:
    """Texts as vectors of length 1; those of a frozen encoder are computed once.

    With own weights, which no text side learns beside, they are those of the encoder's queries, and
    the place of bags is taken by those of its documents, which images look for.
    """

    def __init__(
        self, encoder: CrossModalEncoder, settings: ImageConfig, dense: DenseHeads | None = None
    ) -> None:
        """Takes the text side of an encoder, its queries' maximal length and k.

        Args:
            encoder: Both sides.
            settings: `train_text` says whether vectors of a text change, `sampled_columns` from how
                many columns the gradient of a text's length is estimated.
            dense: Of dense vectors; None without.
        """
        self.is_frozen, self.dense = not settings.train_text, dense
        self.unit_sample = 0 if self.is_frozen else settings.sampled_columns
        self.side = Side.of(encoder.text, "query", lexical=True)
        self.matrix = encoder.image.tower.head.projection
        self._texts: dict[str, tuple[GatedRows, GatedRows]] = {}
        self._states: dict[str, Tensor] = {}

    def encode(self, texts: Sequence[str], needs: set[Need]) -> Vectors:
        """Vectors of texts: `cls` for dense ones, gated rows and perhaps bags for sparse ones."""
        if needs == {"cls"} and self.dense is None:
            found = self.encode(texts, {"gated", "bags"})
            both = GatedRows.concat([known(found.gated), known(found.bags)])
            sums = self.matrix.new_zeros(len(both), self.matrix.shape[1]).index_add(
                0, both.rows, self.matrix[both.columns] * both.weights[:, None]
            )
            return Vectors(cls=F.normalize(sums[: len(texts)] + sums[len(texts) :], dim=1))
        if needs == {"cls"}:
            assert self.dense is not None
            states = self._first_states(texts)
            return Vectors(cls=F.normalize(states @ self.dense.text.T, dim=1))
        if not self.is_frozen:
            return self._encode(texts, needs)
        missing = list(dict.fromkeys(text for text in texts if text not in self._texts))
        if missing:
            with torch.no_grad():
                found = self._encode(missing, needs | {"bags"})
            gated, bags = known(found.gated), known(found.bags)
            for i, text in enumerate(missing):
                place = torch.tensor([i])
                self._texts[text] = (gated.reordered(place), bags.reordered(place))
        rows = [self._texts[text] for text in texts]
        own = GatedRows.concat([bag for _, bag in rows]) if "bags" in needs else None
        return Vectors(gated=GatedRows.concat([gated for gated, _ in rows]), bags=own)

    def _first_states(self, texts: Sequence[str]) -> Tensor:
        """States of first tokens, `[B, H]`; those of a frozen encoder are computed once."""
        if not self.is_frozen:
            return known(self._tokens(texts, {"cls"}).cls)
        missing = list(dict.fromkeys(text for text in texts if text not in self._states))
        if missing:
            with torch.no_grad():
                found = known(self._tokens(missing, {"cls"}).cls)
            self._states |= dict(zip(missing, found, strict=True))
        return torch.stack([self._states[text] for text in texts])

    def _tokens(self, texts: Sequence[str], needs: set[Need]) -> Vectors:
        tokens = self.side.encoder.tokenizer.encode(list(texts))
        chosen = np.arange(len(texts))
        return self.side.encode(tokens, chosen, needs, unit_sample=self.unit_sample)

    def _encode(self, texts: Sequence[str], needs: set[Need]) -> Vectors:
        encoder = self.side.encoder
        if encoder.own_weights is not None:
            gated = self._over_columns(encoder.encode_queries(texts))
            stored = self._over_columns(encoder.encode_documents(texts))
            return Vectors(gated=_unit(gated), bags=_unit(stored))
        with_all = "gated" in needs and not self.unit_sample
        found = self._tokens(texts, needs | ({"dense"} if with_all else set()))
        gated = known(found.gated)
        if with_all:
            # The norm is that of all columns.
            norms = torch.linalg.vector_norm(known(found.dense), dim=1).clamp_min(SMALLEST_NORM)
            gated = replace(gated, weights=gated.weights / norms[gated.rows])
        return Vectors(gated=gated, bags=None if found.bags is None else _unit(found.bags))

    def _over_columns(self, rows: SparseRows) -> GatedRows:
        """Rows of the encoder over its columns instead of token ids."""
        vocabulary, device = self.side.encoder.vocabulary, self.side.encoder.device
        columns = vocabulary.id_to_column[rows.indices].astype(np.int64)
        return GatedRows(
            torch.tensor(np.asarray(rows.indptr, np.int64), device=device),
            torch.tensor(columns, device=device),
            torch.tensor(rows.values, device=device),
            vocabulary.columns,
        )


def kept_columns(texts: TextSide, pairs: Sequence[Pair]) -> Tensor:
    """Columns that at least `KEPT` vectors of texts keep, of both kinds, `[M]` int64, ascending."""
    every = sorted({one for pair in pairs for one in pair.texts})
    with torch.no_grad():
        found = texts.encode(every, {"gated", "bags"})
    both = GatedRows.concat([known(found.gated), known(found.bags)])
    return torch.nonzero(torch.bincount(both.columns) >= KEPT)[:, 0]


def _unit(rows: GatedRows) -> GatedRows:
    """Rows with L2 norm 1; an empty one stays empty."""
    squares = rows.weights.new_zeros(len(rows)).index_add(0, rows.rows, rows.weights.square())
    return replace(rows, weights=rows.weights / squares.sqrt()[rows.rows])


class ImageSide:
    """Images as vectors of length 1."""

    def __init__(
        self,
        encoder: CrossModalEncoder,
        settings: ImageConfig,
        *,
        dense: DenseHeads | None = None,
        is_sparse: bool = True,
        centre: Tensor | None = None,
        kept: KeptRows | None = None,
    ) -> None:
        """Takes the image side of an encoder.

        Args:
            encoder: Both sides.
            settings: `dropout`, `patch_dropout` and `as_one_patch` of a stem's states.
            dense: Of dense vectors; None takes mean states, to compare with rows of the matrix.
            is_sparse: Whether vectors are sparse ones.
            centre: `[C]`, what channels that are dropped are set to; None for 0.
            kept: Rows of the projection that are trained; None for those of the encoder.
        """
        self.encoder, self.settings = encoder.image, settings
        self.dense, self.is_sparse, self.centre, self.kept = dense, is_sparse, centre, kept

    def encode(self, inputs: Tensor, sample: ColumnSample | None = None) -> Vectors:
        """Vectors of images.

        Args:
            inputs: `[B, 3, S, S]` pixels, or `[B, P, C]` states of a hybrid's stem.
            sample: Columns to compute; None for all.

        Returns:
            `dense` `[B, V]`, or `[B, S]` of the sample; or `cls` `[B, H]`.
        """
        states = self.states(inputs)
        if not self.is_sparse:
            means = states.mean(dim=1)
            if self.dense is not None:
                means = means @ self.dense.image.T
            return Vectors(cls=F.normalize(means, dim=1))
        logits = self.logits(states, None if sample is None else sample.columns)
        weights = weigh(logits, self.encoder.activation)
        counted = weights if sample is None else weights * sample.counts.sqrt()
        norms = torch.linalg.vector_norm(counted, dim=1, keepdim=True)
        return Vectors(dense=weights / norms.clamp_min(SMALLEST_NORM))

    def states(self, inputs: Tensor) -> Tensor:
        """States of patches as the matrix wants them, `[B, P, H]`."""
        tower = self.encoder.tower
        inputs = inputs.to(self.encoder.device)
        if not isinstance(tower.body, HybridBody):
            return tower.head.norm(tower.body(inputs))  # type: ignore[no-any-return]
        if self.settings.as_one_patch:
            inputs = self._mean(inputs)
        return tower.head.norm(  # type: ignore[no-any-return]
            tower.body.contextualise(self._dropped(inputs))
        )

    def _mean(self, states: Tensor) -> Tensor:
        """Mean of the patches, `[B, 1, C]`; in training perhaps of some of them, at least one.

        Each step so sees another part of an image, at no cost: a stem's states can be kept.
        """
        share = self.settings.patch_dropout
        if not share or not self.encoder.tower.training:
            return states.mean(dim=1, keepdim=True)
        drawn = torch.rand(states.shape[:2], device=states.device)
        is_kept = (drawn >= share) | (drawn == drawn.amax(dim=1, keepdim=True))
        shares = is_kept / is_kept.sum(dim=1, keepdim=True)
        return shares[:, None].to(states.dtype) @ states

    def _dropped(self, states: Tensor) -> Tensor:
        """Without some channels in training, the same ones in all patches of an image.

        Patches resemble each other: what is dropped in one alone, its neighbours still tell.
        """
        share = self.settings.dropout
        if not share or not self.encoder.tower.training:
            return states
        kept = F.dropout(states.new_ones(states.shape[0], 1, states.shape[2]), share)
        if self.centre is None:
            return states * kept
        return self.centre + (states - self.centre) * kept

    def logits(self, states: Tensor, columns: Tensor | None = None) -> Tensor:
        """Largest score over the patches of `[B, P, H]`, float32 `[B, V]`, or `[B, S]` of some."""
        count, patches = states.shape[:2]
        bounds = torch.arange(count + 1, dtype=torch.int32, device=states.device) * patches
        packed = states.float().flatten(0, 1)
        projection: Tensor = self.encoder.tower.head.projection
        if self.kept is not None:
            projection = self.kept.of(columns)
        elif columns is not None:
            projection = projection[columns]
        return project_pool(packed, bounds, projection, backend=self.encoder.backend).logits
