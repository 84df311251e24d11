"""The loss of a batch: an objective, distillation and regularisers, over all ranks.

    q local [N], d of all ranks [M], positives of all ranks first
    scores  = q . d            [N, M]     each rank its own queries
    loss    = mean over ranks of the ranks' losses

| objective | terms                                                                       |
|-----------|-----------------------------------------------------------------------------|
| `vdr`     | gate(V(q)) . V(d),  BoW(q) . V(d)                                            |
| `svdr`    | gate(V(q)) . V(d),  V(q) . gate(V(d)),  BoW(q) . V(d),  V(q) . BoW(d)          |
| `infonce` | V(q) . V(d)                                                                 |
| `dpr`     | CLS(q) . CLS(d)                                                             |

With `gate_documents`, V(d) is gate(V(d)) throughout, what a store holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vdr_db.training import losses
from vdr_db.training.distributed import (
    gather_dense,
    gather_rows,
    mean_over_ranks,
    rank,
    world_size,
)
from vdr_db.training.settings import LossConfig
from vdr_db.training.sparse_ops import GatedRows, score
from vdr_db.training.vectors import Need, Vectors, known

__all__ = ["Objective", "Rows", "TeacherScores", "gather", "multiply"]

Rows = GatedRows | Tensor


def multiply(left: Rows, right: Rows) -> Tensor:
    """Inner products `[N, M]` of rows of either kind; a sparse side keeps its sparse gradient."""
    if isinstance(left, GatedRows):
        return score(left, right.to_dense() if isinstance(right, GatedRows) else right)
    if isinstance(right, GatedRows):
        return score(right, left).T
    return left @ right.T


def gather(local: Rows, count: int) -> Rows:
    """Rows of all ranks, of each the first `count`, its positives or queries, before all others."""
    if world_size() == 1:
        return local
    size = len(local) if isinstance(local, GatedRows) else local.shape[0]
    places = _positives_first(size, count, torch.device("cpu"))
    if isinstance(local, Tensor):
        everyone = gather_dense(local)
        return everyone if size == count else everyone[places.to(everyone.device)]
    rows = gather_rows(local)
    return rows if size == count else rows.reordered(places)


@dataclass(frozen=True)
class TeacherScores:
    """What teachers say about a batch; None where they say nothing.

    Attributes:
        scores: `[N, M]`, this rank's queries and the documents of all ranks.
        queries: This rank's queries as the first encoder teacher sees them, over our columns.
        documents: This rank's documents likewise.
    """

    scores: Tensor | None = None
    queries: GatedRows | None = None
    documents: GatedRows | None = None


_NEEDS: dict[str, tuple[set[Need], set[Need]]] = {
    "vdr": ({"gated", "bags"}, {"dense"}),
    "svdr": ({"dense", "gated", "bags"}, {"dense", "gated", "bags"}),
    "infonce": ({"dense"}, {"dense"}),
    "dpr": ({"cls"}, {"cls"}),
}
"""Which vectors of queries and documents an objective uses."""


@dataclass(frozen=True)
class Objective:
    """Turns vectors into a loss.

    Attributes:
        settings: Objective, weights, temperatures.
    """

    settings: LossConfig

    def query_needs(self) -> set[Need]:
        """Which query vectors the loss uses."""
        needs = set(_NEEDS[self.settings.objective][0])
        if self.settings.objective == "vdr" and not self.settings.bag_weight:
            needs.discard("bags")
        return needs | self._copied(needs)

    def document_needs(self) -> set[Need]:
        """Which document vectors the loss uses."""
        needs = set(_NEEDS[self.settings.objective][1])
        if self.settings.gate_documents and "dense" in needs:
            needs = needs - {"dense"} | {"gated"}
        return needs | self._copied(needs)

    def _copied(self, needs: set[Need]) -> set[Need]:
        """Imitation looks at all columns where they are there, else at the kept ones."""
        return {"gated"} if self.settings.imitation and "dense" not in needs else set()

    def __call__(
        self,
        queries: Vectors,
        documents: Vectors,
        *,
        taught: TeacherScores | None = None,
        listed: Tensor | None = None,
        regulariser: float = 1.0,
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of this rank, whose mean over ranks is the loss.

        Args:
            queries: This rank's N.
            documents: This rank's: N positives, then equally many negatives of each query.
            taught: What teachers say, or None.
            listed: `[N, 1 + negatives]`, the data file's teacher scores, NaN where absent, or None.
            regulariser: Factor of FLOPS, in 0..1.

        Returns:
            The loss, a scalar, and its parts by name for the log.
        """
        settings = self.settings
        N = len(queries)
        student: Tensor | None = None
        parts: dict[str, Tensor] = {}

        def nll(left: Rows, right: Rows, temperature: float, name: str) -> Tensor:
            scores = multiply(left, gather(right, N))
            passage = None
            if settings.symmetry != "none" and world_size() > 1:
                passage = multiply(_first_rows(right, N), gather(left, N))
            nonlocal student
            if student is None:
                student = scores
            parts[name] = losses.info_nce(
                scores,
                temperature=temperature,
                symmetry=settings.symmetry,
                passage_scores=passage,
                first=rank() * N,
            )
            return parts[name]

        loss = settings.weight * self._objective(queries, documents, nll)
        assert student is not None
        taught = taught or TeacherScores()
        if settings.kl and taught.scores is not None:
            parts["kl"] = self._divergence(student, taught.scores)
            loss = loss + settings.kl * parts["kl"]
        if listed is not None and (settings.kl or settings.margin_mse):
            candidates = student.gather(1, _candidate_columns(N, listed))
            loss = loss + self._listed(candidates, listed, parts)
        for name, vectors, rows in (
            ("query_imitation", queries, taught.queries),
            ("document_imitation", documents, taught.documents),
        ):
            if settings.imitation and rows is not None:
                weights = vectors.dense
                if weights is None:
                    weights = known(vectors.gated).to_dense()
                parts[name] = losses.imitation(weights, rows.to_dense())
                loss = loss + settings.imitation * parts[name]
        penalty = torch.zeros((), device=student.device)
        for name, vectors, weight in (
            ("flops_query", queries, settings.flops_query),
            ("flops_document", documents, settings.flops_document),
        ):
            if weight:
                parts[name] = losses.flops(mean_over_ranks(_column_means(vectors))[None])
                penalty = penalty + weight * parts[name]
        loss = loss + regulariser * penalty
        parts["loss"] = loss
        return loss, {name: float(part.detach()) for name, part in parts.items()}

    def _objective(
        self, queries: Vectors, documents: Vectors, nll: Callable[[Rows, Rows, float, str], Tensor]
    ) -> Tensor:
        settings = self.settings
        t = settings.temperature
        bag_t = settings.bag_temperature or t
        if settings.objective == "dpr":
            return nll(known(queries.cls), known(documents.cls), t, "infonce")
        document: Rows | None = documents.gated if settings.gate_documents else documents.dense
        assert document is not None
        if settings.objective == "infonce":
            return nll(known(queries.dense), document, t, "infonce")
        gated = nll(known(queries.gated), document, t, "parametric")
        weight = settings.bag_weight
        if settings.objective == "vdr":
            if not weight:
                return gated
            lexical = nll(*self._masked(known(queries.bags), document), bag_t, "lexical")
            return losses.vdr(gated, weight * lexical)
        dense = known(queries.dense)
        mirrored = nll(dense, known(documents.gated), t, "document_gated")
        lexical = nll(known(queries.bags), document, bag_t, "lexical")
        mirrored_bag = nll(dense, known(documents.bags), bag_t, "document_lexical")
        return losses.svdr(gated, mirrored, weight * lexical, weight * mirrored_bag)

    def _masked(self, bags: GatedRows, documents: Rows) -> tuple[Rows, Rows]:
        """Bags with their share of unseen columns, positives without those of their query."""
        weight, count = self.settings.contrastive_mask, len(bags)
        if not weight:
            return bags, documents
        assert isinstance(documents, Tensor)
        everyone = gather_rows(bags).to_dense()
        mask = losses.contrastive_mask(everyone)[rank() * count : (rank() + 1) * count]
        kept = torch.cat([documents[:count] * ~mask, documents[count:]])
        return bags.to_dense() + weight * mask, kept

    def _divergence(self, scores: Tensor, teacher: Tensor) -> Tensor:
        return losses.kl_distillation(
            scores,
            teacher,
            temperature=self.settings.student_temperature,
            teacher_temperature=self.settings.teacher_temperature,
        )

    def _listed(self, candidates: Tensor, listed: Tensor, parts: dict[str, Tensor]) -> Tensor:
        settings = self.settings
        total = candidates.new_zeros(())
        taught = ~listed.isnan().any(dim=1)
        if not taught.any():
            return total
        candidates, listed = candidates[taught], listed[taught]
        if settings.kl:
            parts["kl_listed"] = self._divergence(candidates, listed)
            total = total + settings.kl * parts["kl_listed"]
        if settings.margin_mse:
            parts["margin_mse"] = losses.margin_mse(
                candidates / settings.student_temperature, listed / settings.teacher_temperature
            )
            total = total + settings.margin_mse * parts["margin_mse"]
        return total


def _positives_first(size: int, count: int, device: torch.device) -> Tensor:
    """Places, in ranks' blocks of `size` rows, of all ranks' first `count`, then of the rest."""
    blocks = torch.arange(size * world_size(), device=device).view(world_size(), size)
    return torch.cat([blocks[:, :count].reshape(-1), blocks[:, count:].reshape(-1)])


def _first_rows(rows: Rows, count: int) -> Rows:
    if isinstance(rows, Tensor):
        return rows[:count]
    end = int(rows.indptr[count])
    return GatedRows(rows.indptr[: count + 1], rows.columns[:end], rows.weights[:end], rows.width)


def _candidate_columns(count: int, listed: Tensor) -> Tensor:
    """`[N, C]`: where each query's own candidates stand among the documents of all ranks."""
    negatives = listed.shape[1] - 1
    queries = torch.arange(count, device=listed.device) + rank() * count
    after = count * world_size() + queries[:, None] * negatives
    own = after + torch.arange(negatives, device=listed.device)
    return torch.cat([queries[:, None], own], dim=1)


def _column_means(vectors: Vectors) -> Tensor:
    """Mean weight of each column, `[V]`."""
    if vectors.dense is not None:
        return vectors.dense.mean(dim=0)
    rows = known(vectors.gated)
    sums = rows.weights.new_zeros(rows.width).index_add(0, rows.columns, rows.weights)
    return sums / len(rows)
