"""Gradients of the objectives over several ranks, to be compared with those of one big batch.

The "model" is two matrices: a text's logits are its features times a matrix. Features are cut into
equal shares for the ranks; everything else is the library's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vdr_db.training import distributed
from vdr_db.training.config import build_config
from vdr_db.training.objective import Objective, TeacherScores
from vdr_db.training.sparse_ops import GatedRows, gate
from vdr_db.training.vectors import Vectors

QUERIES, NEGATIVES, FEATURES, COLUMNS = 4, 2, 5, 13
CASES: dict[str, dict[str, Any]] = {
    "vdr": {"objective": "vdr", "temperature": 3.0},
    "vdr gated": {"objective": "vdr", "gate_documents": True, "flops_document": 0.3},
    "vdr mask": {"objective": "vdr", "contrastive_mask": 0.5},
    "svdr": {"objective": "svdr"},
    "infonce": {"objective": "infonce", "flops_query": 0.2, "flops_document": 0.1},
    "distilled": {"objective": "infonce", "kl": 0.7, "margin_mse": 0.3, "symmetry": "none"},
    "dpr": {"objective": "dpr"},
}


def gradients(case: str) -> list[torch.Tensor]:
    """Gradients of both matrices, averaged over ranks."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    total, rank, ranks = QUERIES * (1 + NEGATIVES), distributed.rank(), distributed.world_size()
    query_features, document_features = normal(QUERIES, FEATURES), normal(total, FEATURES)
    query_bags, document_bags = normal(QUERIES, COLUMNS) > 1, normal(total, COLUMNS) > 1
    teacher, listed = normal(QUERIES, total), normal(QUERIES, 1 + NEGATIVES)
    query_matrix = normal(FEATURES, COLUMNS).requires_grad_()
    document_matrix = normal(FEATURES, COLUMNS).requires_grad_()
    share = QUERIES // ranks
    own = slice(rank * share, (rank + 1) * share)
    after = slice(QUERIES + own.start * NEGATIVES, QUERIES + own.stop * NEGATIVES)
    mine = [*range(QUERIES)[own], *range(total)[after]]

    def vectors(features: torch.Tensor, matrix: torch.Tensor, bags: torch.Tensor) -> Vectors:
        logits = features @ matrix
        weights = torch.where(logits >= 0, logits + 1, logits.clamp(max=0).exp())
        kept = gate(logits.detach().float(), 4)
        rows = GatedRows(kept.indptr, kept.columns.long(), kept.weights, COLUMNS)
        gated = replace(rows, weights=weights[rows.rows, rows.columns])
        owner, columns = bags.nonzero(as_tuple=True)
        indptr = torch.searchsorted(owner, torch.arange(len(bags) + 1))
        ones = torch.ones(len(columns), dtype=torch.float64)
        bag = GatedRows(indptr, columns, ones, COLUMNS)
        return Vectors(weights, gated, bag, logits)

    objective = Objective(build_config({"loss": CASES[case]}).loss)
    is_taught = CASES[case].get("kl")
    loss, _ = objective(
        vectors(query_features[own], query_matrix, query_bags[own]),
        vectors(document_features[mine], document_matrix, document_bags[mine]),
        taught=TeacherScores(teacher[own]) if is_taught else None,
        listed=listed[own] if is_taught else None,
    )
    loss.backward()
    parameters = [torch.nn.Parameter(m.detach()) for m in (query_matrix, document_matrix)]
    for parameter, matrix in zip(parameters, (query_matrix, document_matrix), strict=True):
        parameter.grad = matrix.grad
    distributed.average_gradients(parameters)
    return [torch.zeros(1) if p.grad is None else p.grad for p in parameters]


def save_gradients(job: dict[str, Any]) -> None:
    """All cases' gradients on this rank, as a file of rank 0."""
    with distributed.process_group(torch.device("cpu")):
        found = {case: gradients(case) for case in CASES}
        if distributed.rank() == 0:
            torch.save(found, Path(job["output"]))
