"""What a trainer trains: the part of a run that depends on what is learnt from.

Two implementations: `vdr_db.training.texts.TextTask`, and `ImageTask` of `vdr_db.training.images`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from vdr_db.errors import ConfigError
from vdr_db.training.distributed import rank, world_size
from vdr_db.training.settings import TrainConfig

__all__ = ["Epochs", "Task", "seeded", "share_of_rank"]

E = TypeVar("E")
Kind = TypeVar("Kind", covariant=True)
B = TypeVar("B")


class Epochs(Protocol[Kind]):
    """Examples in global batches, whose order is a function of the number of the epoch.

    Attributes:
        skipped: Bad examples left out of the newest epoch.
    """

    skipped: int

    def epoch(self, number: int, *, skip: int = 0) -> Iterator[Sequence[Kind]]:
        """Full batches of all ranks, without the first `skip`."""


class Task(Protocol[E, B]):
    """A model, its data, its loss and what it is measured on.

    E is an example, B a batch of one rank. `load` comes before everything but `config`, within the
    process group.

    Attributes:
        config: All settings.
        parameters: What is trained, by name.
        data: What it is trained on.
    """

    config: TrainConfig
    parameters: dict[str, nn.Parameter]
    data: Epochs[E]

    @abstractmethod
    def load(self, output: Path, device: torch.device) -> None:
        """Loads model and data, to train on `device` in the run's folder `output`.

        Raises:
            ConfigError: Settings that cannot work.
            InputError: Bad data; the message names file and line.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The model's tensors by name, as a checkpoint keeps them; not copies."""

    @abstractmethod
    def batch(self, examples: Sequence[E]) -> B:
        """A batch of this rank's examples."""

    @abstractmethod
    def learn(
        self, batch: B, scaler: torch.amp.GradScaler, *, regulariser: float, share: float
    ) -> dict[str, float]:
        """Adds the gradient of one batch.

        Args:
            batch: What to learn from.
            scaler: Of the loss in float16.
            regulariser: Factor of FLOPS, in 0..1.
            share: Of this batch in the step's loss.

        Returns:
            Parts of its loss by name, `loss` among them.
        """

    @abstractmethod
    def set_training(self, mode: bool) -> None:
        """Turns dropout on or off."""

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """Figures on the held-out part, `ndcg@10` among them."""

    @abstractmethod
    def save(self, output: Path) -> None:
        """Writes the model as it is into `MODEL_FOLDER` of a run's folder."""

    @property
    def is_measured(self) -> bool:
        """Whether there is a held-out part."""
        return bool(self.config.evaluation.folder)

    def batches(self, epoch: int, skip: int) -> Iterator[B]:
        """This rank's shares of an epoch's batches, without the first `skip`."""
        for examples in self.data.epoch(epoch, skip=skip):
            yield self.batch(share_of_rank(examples, rank=rank(), world_size=world_size()))


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draws from a seed within the block, on CPU and device, which go on afterwards as before.

    None leaves the generators alone.
    """
    own = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(own, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def share_of_rank(examples: Sequence[E], *, rank: int, world_size: int) -> Sequence[E]:
    """A rank's examples out of those of all ranks.

    Raises:
        ConfigError: The number of ranks does not divide that of examples.
    """
    if len(examples) % world_size:
        raise ConfigError(
            f"`run.batch_size` must be a multiple of the {world_size} ranks, got {len(examples)}."
        )
    share = len(examples) // world_size
    return examples[rank * share : (rank + 1) * share]
