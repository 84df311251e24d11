"""One batch: from texts to gradients, with or without gradient caching.

    1. all chunks are encoded without gradient, and their vectors become leaves
    2. the loss of the whole batch is taken on the leaves, which collect its gradient
    3. each chunk is encoded again with gradient, and passes its leaves' gradient on

Dropout draws the same in 1 and 3. The result is the whole batch's gradient for a chunk's memory.

Source of gradient caching: Gao et al. 2021, https://arxiv.org/abs/2101.06983.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdr_db.encoders.text import SparseEncoder
from vdr_db.text.tokenization import TokenizedTexts
from vdr_db.training.data import Batch
from vdr_db.training.objective import Objective, TeacherScores, gather, multiply
from vdr_db.training.prefetch import TokenBatch
from vdr_db.training.settings import RunConfig
from vdr_db.training.sparse_ops import GatedRows
from vdr_db.training.teachers import EncoderTeacher, Teacher
from vdr_db.training.vectors import Need, Side, Vectors

__all__ = ["DTYPES", "Learner"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Learner:
    """Adds a batch's gradient to the parameters of an encoder."""

    def __init__(
        self,
        encoder: SparseEncoder,
        sides: tuple[Side, Side],
        objective: Objective,
        teachers: Sequence[Teacher],
        settings: RunConfig,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Puts the parts together.

        Args:
            encoder: The student.
            sides: Queries and documents.
            objective: What is minimised.
            teachers: Whom it imitates.
            settings: Chunk and precision count.
            scaler: Of the loss in float16.
        """
        self.encoder, self.objective, self.teachers = encoder, objective, teachers
        self.query_side, self.document_side = sides
        self.chunk, self.precision = settings.chunk, settings.precision
        self.scaler, self.device = scaler, encoder.device

    def learn(self, tokens: TokenBatch, *, regulariser: float, share: float) -> dict[str, float]:
        """Adds the gradient of one batch.

        Args:
            tokens: The batch.
            regulariser: Factor of FLOPS and L1, in 0..1.
            share: Of this batch in the step's loss.

        Returns:
            Parts of its loss by name.
        """
        taught = self._teach(tokens.batch)
        query_needs, document_needs = self.objective.query_needs(), self.objective.document_needs()
        jobs = [
            _Job(side, texts, needs, rows)
            for side, texts, needs, rows in (
                (self.query_side, tokens.queries, query_needs, taught.queries),
                (self.document_side, tokens.documents, document_needs, taught.documents),
            )
        ]
        chunk = self.chunk
        if not chunk:
            queries, documents = (self._encode(job) for job in jobs)
            return self._loss(queries, documents, tokens.batch, taught, regulariser, share)
        chunks = [[job.part(start, chunk) for start in range(0, job.count, chunk)] for job in jobs]
        jobs = [*chunks[0], *chunks[1]]
        seeds = [int(torch.randint(1 << 62, ())) for _ in jobs]
        with torch.no_grad():
            leaves = [
                self._encode(job, seed).detached() for job, seed in zip(jobs, seeds, strict=True)
            ]
        split = len(chunks[0])
        queries, documents = Vectors.concat(leaves[:split]), Vectors.concat(leaves[split:])
        parts = self._loss(queries, documents, tokens.batch, taught, regulariser, share)
        for job, seed, leaf in zip(jobs, seeds, leaves, strict=True):
            again = self._encode(job, seed).leaves()
            pairs = [
                (tensor, stored.grad)
                for tensor, stored in zip(again, leaf.leaves(), strict=True)
                if stored.grad is not None
            ]
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        return parts

    def _encode(self, job: _Job, seed: int | None = None) -> Vectors:
        """Vectors of a job's texts; with a seed, dropout draws the same each time."""
        precision = self.precision
        with torch.random.fork_rng(self._own_devices(), enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            with torch.autocast(
                self.device.type, dtype=DTYPES[precision], enabled=precision != "float32"
            ):
                return job.side.encode(job.texts, job.chosen, job.needs, job.also)

    def _loss(
        self,
        queries: Vectors,
        documents: Vectors,
        batch: Batch,
        taught: TeacherScores,
        regulariser: float,
        share: float,
    ) -> dict[str, float]:
        listed = None
        if batch.scores is not None:
            listed = torch.from_numpy(batch.scores).to(self.device)
        loss, parts = self.objective(
            queries, documents, taught=taught, listed=listed, regulariser=regulariser
        )
        self.scaler.scale(loss * share).backward()
        return parts

    @torch.no_grad()
    def _teach(self, batch: Batch) -> TeacherScores:
        """What all teachers say about a batch."""
        scores: Tensor | None = None
        copied: list[GatedRows] = []
        for teacher in self.teachers:
            queries = teacher.queries(batch.queries)
            documents = teacher.documents(batch.documents)
            given = multiply(queries, gather(documents, len(batch.queries)))
            scores = teacher.weight * given if scores is None else scores + teacher.weight * given
            if isinstance(teacher, EncoderTeacher) and not copied:
                copied = [
                    teacher.over_columns(rows, self.encoder)
                    for rows in (queries, documents)
                    if isinstance(rows, GatedRows)
                ]
        if not copied or not self.objective.settings.imitation:
            return TeacherScores(scores)
        return TeacherScores(scores, *copied)

    def _own_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []


@dataclass(frozen=True)
class _Job:
    """Texts to encode.

    Attributes:
        side: How.
        texts: Tokens of a batch's texts.
        needs: Which vectors.
        rows: Columns that every text of the batch keeps in any case, or None.
        span: First and last of the texts; None for all.
    """

    side: Side
    texts: TokenizedTexts
    needs: set[Need]
    rows: GatedRows | None
    span: tuple[int, int] | None = None

    @property
    def count(self) -> int:
        """Texts of the batch."""
        return len(self.texts.lengths)

    @property
    def chosen(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Numbers of the texts."""
        return np.arange(*(self.span or (0, self.count)))

    @property
    def also(self) -> GatedRows | None:
        """Rows of the chosen texts."""
        if self.rows is None or self.span is None:
            return self.rows
        return self.rows.reordered(torch.from_numpy(self.chosen))

    def part(self, start: int, size: int) -> _Job:
        """Some of the texts."""
        return replace(self, span=(start, min(start + size, self.count)))
