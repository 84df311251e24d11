"""Training on texts: a sparse or dense encoder of queries and documents.

With gradient caching (`run.chunk`), one batch goes from texts to gradients like this:

    1. all chunks are encoded without gradient, and their vectors become leaves
    2. the loss of the whole batch is taken on the leaves, which collect its gradient
    3. each chunk is encoded again with gradient, and passes its leaves' gradient on

Dropout draws the same in 1 and 3. The result is the whole batch's gradient for a chunk's memory.

Source of gradient caching: Gao et al. 2021, https://arxiv.org/abs/2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import ConfigError
from vdr_db.text.tokenization import TokenizedTexts
from vdr_db.training.data import Batch, Batches, make_batch
from vdr_db.training.examples import Example, Source, read_examples
from vdr_db.training.models import (
    DTYPES,
    MODEL_FOLDER,
    load_student,
    make_sides,
    save_model,
    set_dropout,
    trainable,
)
from vdr_db.training.objective import Objective, TeacherScores, gather, multiply
from vdr_db.training.settings import TrainConfig
from vdr_db.training.sparse_ops import GatedRows
from vdr_db.training.task import Task, seeded
from vdr_db.training.teachers import EncoderTeacher, Teacher, make_teachers
from vdr_db.training.vectors import Need, Side, Vectors
from vdr_db.training.watch import HeldOut

__all__ = ["TeacherMaker", "TextTask", "TokenBatch"]

TeacherMaker = Callable[
    [TrainConfig, SparseEncoder, Callable[[], Iterable[str]]], Sequence[Teacher]
]
"""Settings, student and what reads the training documents to teachers."""


@dataclass(frozen=True)
class TokenBatch:
    """A batch and its tokens."""

    batch: Batch
    queries: TokenizedTexts
    documents: TokenizedTexts


@dataclass(frozen=True)
class _Job:
    """Texts of one side to encode together.

    Attributes:
        side: How.
        texts: Tokens of a batch's texts.
        chosen: `[B]`, numbers of some of these texts.
        needs: Which vectors.
        also: Columns that they keep in any case, or None.
    """

    side: Side
    texts: TokenizedTexts
    chosen: npt.NDArray[np.int64]
    needs: set[Need]
    also: GatedRows | None


class TextTask(Task[Example, TokenBatch]):
    """Queries and documents; see `Task`.

    Attributes:
        config: All settings.
        encoder: What is trained, after `load`.
    """

    def __init__(self, config: TrainConfig, *, teachers: TeacherMaker = make_teachers) -> None:
        """Takes all settings, and what makes the teachers: usually the configured ones."""
        self.config, self._make_teachers = config, teachers
        self.objective = Objective(config.loss)

    def load(self, output: Path, device: torch.device) -> None:
        """Loads model, teachers and held-out part."""
        config = self.config
        self.data = Batches(
            [Source(Path(item.path), item.format, item.weight) for item in config.data.train],
            config.run.batch_size,
            negatives=config.data.negatives,
            seed=config.run.seed,
            buffer=config.data.buffer,
            bucket=config.data.bucket,
            on_bad=config.data.on_bad,
        )
        self.encoder = load_student(config.model, device)
        set_dropout(self.encoder, config.run.dropout)
        self.sides = make_sides(self.encoder, config.model)
        self.parameters = trainable(self.encoder, freeze_embeddings=config.model.freeze_embeddings)
        self._held_out = HeldOut(config.evaluation) if self.is_measured else None
        self._teachers = self._make_teachers(config, self.encoder, self._documents)
        if config.loss.imitation and not any(isinstance(t, EncoderTeacher) for t in self._teachers):
            raise ConfigError(
                "`loss.imitation` needs a teacher of kind `encoder`, got none; add one to "
                "`teachers`, or set it to 0."
            )

    def _documents(self) -> Iterator[str]:
        for source in self.data.sources:
            for example in read_examples(source, on_bad=lambda error: None):
                yield example.positives[0]

    def state(self) -> dict[str, Tensor]:
        """All of the encoder's tensors."""
        return self.encoder.named_tensors()

    def batch(self, examples: Sequence[Example]) -> TokenBatch:
        """Texts and their tokens."""
        batch, encode = make_batch(examples), self.encoder.tokenizer.encode
        return TokenBatch(batch, encode(batch.queries), encode(batch.documents))

    def learn(
        self, batch: TokenBatch, scaler: torch.amp.GradScaler, *, regulariser: float, share: float
    ) -> dict[str, float]:
        """Adds the gradient of one batch, with or without gradient caching."""
        taught = self._teach(batch.batch)
        listed = None
        if batch.batch.scores is not None:
            listed = torch.from_numpy(batch.batch.scores).to(self.encoder.device)

        def loss(queries: Vectors, documents: Vectors) -> dict[str, float]:
            total, parts = self.objective(
                queries, documents, taught=taught, listed=listed, regulariser=regulariser
            )
            scaler.scale(total * share).backward()
            return parts

        objective, (query, document) = self.objective, self.sides
        of_queries = self._jobs(query, batch.queries, objective.query_needs(), taught.queries)
        of_documents = self._jobs(
            document, batch.documents, objective.document_needs(), taught.documents
        )
        if not self.config.run.chunk:
            return loss(self._encode(of_queries[0]), self._encode(of_documents[0]))
        jobs = [*of_queries, *of_documents]
        seeds = [int(torch.randint(1 << 62, ())) for _ in jobs]
        with torch.no_grad():
            leaves = [
                self._encode(job, seed).detached() for job, seed in zip(jobs, seeds, strict=True)
            ]
        split = len(of_queries)
        parts = loss(Vectors.concat(leaves[:split]), Vectors.concat(leaves[split:]))
        for job, seed, leaf in zip(jobs, seeds, leaves, strict=True):
            again = self._encode(job, seed).leaves()
            gradients = [stored.grad for stored in leaf.leaves()]
            used = [i for i, gradient in enumerate(gradients) if gradient is not None]
            torch.autograd.backward([again[i] for i in used], [gradients[i] for i in used])
        return parts

    def _jobs(
        self, side: Side, texts: TokenizedTexts, needs: set[Need], rows: GatedRows | None
    ) -> list[_Job]:
        """Texts of a side in chunks, with the columns that they keep in any case."""
        numbers = np.arange(len(texts.lengths))
        size = self.config.run.chunk or len(numbers)
        jobs = []
        for start in range(0, len(numbers), size):
            chosen = numbers[start : start + size]
            also = None if rows is None else rows.reordered(torch.from_numpy(chosen))
            jobs.append(_Job(side, texts, chosen, needs, also))
        return jobs

    def _encode(self, job: _Job, seed: int | None = None) -> Vectors:
        """Vectors of a job's texts; with a seed, dropout draws the same each time."""
        device, precision = self.encoder.device, self.config.run.precision
        autocast = torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32")
        with seeded(seed, device), autocast:
            return job.side.encode(job.texts, job.chosen, job.needs, job.also)

    @torch.no_grad()
    def _teach(self, batch: Batch) -> TeacherScores:
        """What all teachers say about a batch."""
        scores: Tensor | None = None
        copied: list[GatedRows] = []
        for teacher in self._teachers:
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
        if not self.objective.settings.imitation:
            return TeacherScores(scores)
        return TeacherScores(scores, *copied)

    def set_training(self, mode: bool) -> None:
        """Turns dropout on or off."""
        for tower in (self.encoder.document_tower, self.encoder.query_tower):
            tower.train(mode)

    def measure(self) -> dict[str, float]:
        """nDCG@10 and recall@100 on the held-out part, and the sizes of sparse vectors."""
        if self._held_out is None:
            return {}
        if self.config.loss.objective == "dpr":
            return self._held_out.measure_dense(*self.sides)
        return self._held_out.measure(self.encoder)

    def save(self, output: Path) -> None:
        """Writes the encoder."""
        save_model(self.encoder, output / MODEL_FOLDER, DTYPES[self.config.model.save_dtype])
