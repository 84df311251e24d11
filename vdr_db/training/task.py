"""What a run trains, and on what: everything in which one kind of training differs from another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vdr_db.encoders.text import SparseEncoder
from vdr_db.training.data import Batches, make_batch
from vdr_db.training.distributed import rank, world_size
from vdr_db.training.examples import Example, Source, read_examples
from vdr_db.training.learner import DTYPES, Learner
from vdr_db.training.models import load_student, make_sides, save_model, set_dropout, trainable
from vdr_db.training.objective import Objective
from vdr_db.training.prefetch import TokenBatch
from vdr_db.training.settings import TrainConfig
from vdr_db.training.teachers import make_teachers
from vdr_db.training.watch import HeldOut

__all__ = ["Epochs", "Task", "TaskBatch", "TextTask"]

ExampleT = TypeVar("ExampleT")
ExampleT_co = TypeVar("ExampleT_co", covariant=True)


class TaskBatch(Protocol):
    """A rank's share of a batch, and its place in the data."""

    @property
    def epoch(self) -> int:
        """Of the data."""

    @property
    def number(self) -> int:
        """Of the global batch within it, from 1."""


BatchT = TypeVar("BatchT", bound=TaskBatch)


class Epochs(Protocol[ExampleT_co]):
    """Examples in batches, the same ones for the same epoch."""

    skipped: int

    def epoch(self, number: int, *, skip: int = 0) -> Iterator[Sequence[ExampleT_co]]:
        """Global batches of an epoch, the first `skip` left out."""


class Task(ABC, Generic[ExampleT, BatchT]):
    """What is trained on what. `Trainer` is the loop around it.

    Attributes:
        config: All settings.
        parameters: What the optimiser moves, by name; there once the task is loaded.
        batches: The examples; there once the task is loaded.
    """

    config: TrainConfig
    parameters: dict[str, nn.Parameter]
    batches: Epochs[ExampleT]

    @abstractmethod
    def load(self, device: torch.device, output: Path, scaler: torch.amp.GradScaler) -> None:
        """Loads models and data.

        Args:
            device: Where to train.
            output: Folder of the run.
            scaler: Of the loss in float16.

        Raises:
            ConfigError: Settings that cannot work.
            InputError: Bad data; the message names file and line.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the models, by name."""

    @abstractmethod
    def batch(self, examples: Sequence[ExampleT], epoch: int, number: int) -> BatchT:
        """This rank's share of a global batch, ready to learn from."""

    @abstractmethod
    def learn(self, batch: BatchT, *, regulariser: float, share: float) -> dict[str, float]:
        """Adds the gradient of one batch.

        Args:
            batch: The batch.
            regulariser: Factor of FLOPS and L1, in 0..1.
            share: Of this batch in the step's loss.

        Returns:
            Parts of its loss by name.
        """

    @property
    @abstractmethod
    def is_watched(self) -> bool:
        """Whether there is a held-out part to measure."""

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """Quality on the held-out part, with the key `"ndcg@10"`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the model as it is now, in the dtype of `model.save_dtype`."""

    @abstractmethod
    def set_training(self, mode: bool) -> None:
        """Turns dropout on or off."""


class TextTask(Task[Example, TokenBatch]):
    """A text encoder trained on queries and documents.

    Attributes:
        encoder: The student; there once the task is loaded.
    """

    encoder: SparseEncoder

    def __init__(self, config: TrainConfig) -> None:
        """Takes the settings; nothing is loaded yet."""
        self.config = config

    def load(self, device: torch.device, output: Path, scaler: torch.amp.GradScaler) -> None:
        """Loads student, teachers and data; see `Task`."""
        config = self.config
        sources = [
            Source(Path(item.path), item.format, item.weight, item.split)
            for item in config.data.train
        ]
        self.batches = Batches(
            sources,
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
        self.held_out = HeldOut(config.evaluation) if config.evaluation.folder else None
        teachers = make_teachers(
            config.teachers,
            self.encoder,
            _first_positives(sources),
            max_length=config.model.max_length,
            query_max_length=config.model.query_max_length,
        )
        objective = Objective(config.loss)
        self.learner = Learner(self.encoder, self.sides, objective, teachers, config.run, scaler)

    def tensors(self) -> dict[str, Tensor]:
        """All weights of the student."""
        return self.encoder.named_tensors()

    def batch(self, examples: Sequence[Example], epoch: int, number: int) -> TokenBatch:
        """Tokens of this rank's texts."""
        own = make_batch(examples, rank=rank(), world_size=world_size())
        tokens = self.encoder.tokenizer
        queries, documents = tokens.encode(own.queries), tokens.encode(own.documents)
        return TokenBatch(own, queries, documents, epoch, number)

    def learn(self, batch: TokenBatch, *, regulariser: float, share: float) -> dict[str, float]:
        """Adds the gradient of one batch; see `Task`."""
        return self.learner.learn(batch, regulariser=regulariser, share=share)

    @property
    def is_watched(self) -> bool:
        """Whether there is a test collection to measure on."""
        return self.held_out is not None

    def measure(self) -> dict[str, float]:
        """Quality on the test collection."""
        assert self.held_out is not None
        if self.config.loss.objective == "dpr":
            return self.held_out.measure_dense(*self.sides)
        return self.held_out.measure(self.encoder)

    def save(self, folder: Path) -> None:
        """Writes the student."""
        save_model(self.encoder, folder, DTYPES[self.config.model.save_dtype])

    def set_training(self, mode: bool) -> None:
        """Turns dropout of both towers on or off."""
        for tower in (self.encoder.document_tower, self.encoder.query_tower):
            tower.train(mode)


def _first_positives(sources: Sequence[Source]) -> Iterator[str]:
    for source in sources:
        for example in read_examples(source, on_bad=lambda error: None):
            yield example.positives[0]
