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

from vdr_db.errors import ConfigError
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
    """Rows of all ranks, the positives of all first.

    Args:
        local: This rank's rows.
        count: How many of them, at the start, are positives, or queries.
    """
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


@dataclass(frozen=True)
class Objective:
    """Turns vectors into a loss.

    Attributes:
        settings: Objective, weights, temperatures.
    """

    settings: LossConfig

    def __post_init__(self) -> None:
        """Refuses what the formulas do not allow."""
        settings = self.settings
        if settings.contrastive_mask and self.documents_are_gated:
            raise ConfigError(
                "`loss.contrastive_mask` needs dense documents; set `loss.gate_documents: false`."
            )
        if settings.contrastive_mask and settings.objective not in ("vdr", "svdr"):
            raise ConfigError(
                "`loss.contrastive_mask` belongs to the objectives 'vdr' and 'svdr', got "
                f"{settings.objective!r}."
            )

    @property
    def documents_are_gated(self) -> bool:
        """Whether V(d) means its gated form everywhere."""
        return self.settings.gate_documents

    def query_needs(self) -> set[Need]:
        """Which query vectors the loss uses."""
        return self._needs("query") | self._copied("query")

    def document_needs(self) -> set[Need]:
        """Which document vectors the loss uses."""
        return self._needs("document") | self._copied("document")

    def _copied(self, side: str) -> set[Need]:
        """Imitation looks at all columns where they are there, else at the kept ones."""
        is_dense = "dense" in self._needs(side)
        return {"gated"} if self.settings.imitation and not is_dense else set()

    def _needs(self, side: str) -> set[Need]:
        settings = self.settings
        needs: set[Need]
        if settings.objective == "dpr":
            return {"cls"}
        if settings.objective == "infonce":
            return {"gated"} if side == "document" and self.documents_are_gated else {"dense"}
        if settings.objective == "svdr":
            needs = {"dense", "gated", "bags"}
            if side == "document" and self.documents_are_gated:
                needs.discard("dense")
            return needs
        if side == "query":
            return {"gated", "bags"} if settings.bag_weight else {"gated"}
        return {"gated"} if self.documents_are_gated else {"dense"}

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
            regulariser: Factor of FLOPS and L1, in 0..1.

        Returns:
            The loss, a scalar, and its parts by name for the log.
        """
        settings = self.settings
        N = self._count(queries)
        first = rank() * N
        student: Tensor | None = None
        parts: dict[str, Tensor] = {}

        def nll(left: Rows, right: Rows, temperature: float, name: str) -> Tensor:
            everyone = gather(right, N)
            scores = multiply(left, everyone)
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
                first=first,
            )
            return parts[name]

        objective = self._objective(queries, documents, nll)
        loss = settings.weight * objective
        assert student is not None
        taught = taught or TeacherScores()
        if settings.kl and taught.scores is not None:
            parts["kl"] = losses.kl_distillation(
                student,
                taught.scores,
                temperature=settings.student_temperature,
                teacher_temperature=settings.teacher_temperature,
            )
            loss = loss + settings.kl * parts["kl"]
        if listed is not None and (settings.kl or settings.margin_mse):
            candidates = student.gather(1, _candidate_columns(N, listed, student.shape[1]))
            loss = loss + self._listed(candidates, listed, parts)
        for name, vectors, rows in (
            ("query_imitation", queries, taught.queries),
            ("document_imitation", documents, taught.documents),
        ):
            if settings.imitation and rows is not None:
                parts[name] = losses.imitation(_weights(vectors), rows.to_dense())
                loss = loss + settings.imitation * parts[name]
        loss = loss + regulariser * self._regularised(queries, documents, parts)
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
        document: Rows | None = documents.gated if self.documents_are_gated else documents.dense
        assert document is not None
        if settings.objective == "infonce":
            return nll(known(queries.dense), document, t, "infonce")
        gated = nll(known(queries.gated), document, t, "parametric")
        if settings.objective == "vdr":
            if not settings.bag_weight:
                return gated
            bag, masked = self._masked(known(queries.bags), document, self._count(queries))
            lexical = nll(bag, masked, bag_t, "lexical")
            return losses.vdr(gated, settings.bag_weight * lexical)
        dense = known(queries.dense)
        mirrored = nll(dense, known(documents.gated), t, "document_gated")
        bag, masked = self._masked(known(queries.bags), document, self._count(queries))
        lexical = nll(bag, masked, bag_t, "lexical")
        bag, query = self._mirror_masked(known(documents.bags), dense)
        mirrored_bag = nll(query, bag, bag_t, "document_lexical")
        weight = settings.bag_weight
        return losses.svdr(gated, mirrored, weight * lexical, weight * mirrored_bag)

    def _masked(self, bags: GatedRows, documents: Rows, count: int) -> tuple[Rows, Rows]:
        """Bags with their share of unseen columns, positives without those of their query."""
        weight = self.settings.contrastive_mask
        if not weight:
            return bags, documents
        assert isinstance(documents, Tensor)
        everyone = gather_rows(bags).to_dense()
        mask = losses.contrastive_mask(everyone)[rank() * count : (rank() + 1) * count]
        kept = torch.cat([documents[:count] * ~mask, documents[count:]])
        return bags.to_dense() + weight * mask, kept

    def _mirror_masked(self, bags: GatedRows, queries: Tensor) -> tuple[Rows, Rows]:
        """The same with the sides exchanged."""
        weight = self.settings.contrastive_mask
        if not weight:
            return bags, queries
        count = queries.shape[0]
        places = _positives_first(len(bags), count, bags.columns.device)
        everyone = gather_rows(bags).to_dense()[places]
        whole = losses.contrastive_mask(everyone)
        mask = whole.new_empty(whole.shape)
        mask[places] = whole
        local = mask[rank() * len(bags) : (rank() + 1) * len(bags)]
        positives = whole[rank() * count : (rank() + 1) * count]
        return bags.to_dense() + weight * local, queries * ~positives

    def _listed(self, candidates: Tensor, listed: Tensor, parts: dict[str, Tensor]) -> Tensor:
        settings = self.settings
        total = candidates.new_zeros(())
        taught = ~listed.isnan().any(dim=1)
        if not taught.any():
            return total
        candidates, listed = candidates[taught], listed[taught]
        if settings.kl:
            parts["kl_listed"] = losses.kl_distillation(
                candidates,
                listed,
                temperature=settings.student_temperature,
                teacher_temperature=settings.teacher_temperature,
            )
            total = total + settings.kl * parts["kl_listed"]
        if settings.margin_mse:
            parts["margin_mse"] = losses.margin_mse(
                candidates / settings.student_temperature, listed / settings.teacher_temperature
            )
            total = total + settings.margin_mse * parts["margin_mse"]
        return total

    def _regularised(
        self, queries: Vectors, documents: Vectors, parts: dict[str, Tensor]
    ) -> Tensor:
        settings = self.settings
        total = torch.zeros((), device=queries.leaves()[0].device)
        for name, vectors, weight, of in (
            ("flops_query", queries, settings.flops_query, losses.flops),
            ("flops_document", documents, settings.flops_document, losses.flops),
            ("l1_query", queries, settings.l1_query, losses.l1),
            ("l1_document", documents, settings.l1_document, losses.l1),
        ):
            if weight:
                parts[name] = of(mean_over_ranks(_column_means(vectors))[None])
                total = total + weight * parts[name]
        return total

    @staticmethod
    def _count(queries: Vectors) -> int:
        if queries.gated is not None:
            return len(queries.gated)
        return queries.leaves()[0].shape[0]


def _positives_first(size: int, count: int, device: torch.device) -> Tensor:
    """Places, in ranks' blocks of `size` rows, of all ranks' first `count`, then of the rest."""
    blocks = torch.arange(size * world_size(), device=device).view(world_size(), size)
    return torch.cat([blocks[:, :count].reshape(-1), blocks[:, count:].reshape(-1)])


def _first_rows(rows: Rows, count: int) -> Rows:
    if isinstance(rows, Tensor):
        return rows[:count]
    end = int(rows.indptr[count])
    return GatedRows(rows.indptr[: count + 1], rows.columns[:end], rows.weights[:end], rows.width)


def _candidate_columns(count: int, listed: Tensor, columns: int) -> Tensor:
    """`[N, C]`: where each query's own candidates stand among the documents of all ranks."""
    negatives = listed.shape[1] - 1
    queries = torch.arange(count, device=listed.device) + rank() * count
    after = count * world_size() + queries[:, None] * negatives
    own = after + torch.arange(negatives, device=listed.device)
    return torch.cat([queries[:, None], own], dim=1)


def _weights(vectors: Vectors) -> Tensor:
    """`[B, V]`: all weights, or the kept ones and zeros."""
    if vectors.dense is not None:
        return vectors.dense
    return known(vectors.gated).to_dense()


def _column_means(vectors: Vectors) -> Tensor:
    """Mean weight of each column, `[V]`."""
    if vectors.dense is not None:
        return vectors.dense.mean(dim=0)
    rows = known(vectors.gated)
    sums = rows.weights.new_zeros(rows.width).index_add(0, rows.columns, rows.weights)
    return sums / len(rows)
