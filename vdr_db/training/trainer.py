"""The training loop, from top to bottom in one file.

    batch of this rank -> loss over all ranks -> gradients -> mean over ranks
    -> clip -> AdamW step -> log, evaluate, checkpoint

`Trainer.run` is the loop; what a batch is and how its loss is taken is the task's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from vdr_db.errors import ConfigError
from vdr_db.training.averaging import WeightMean, mixed_weights
from vdr_db.training.checkpoint import (
    Position,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from vdr_db.training.distributed import (
    average_gradients,
    mean_over_ranks,
    process_group,
    rank,
    world_size,
)
from vdr_db.training.prefetch import ahead
from vdr_db.training.schedule import learning_rate_factor, make_optimiser
from vdr_db.training.task import Task, seeded, share_of_rank
from vdr_db.training.watch import LOG_FILE, RunLog, read_log

__all__ = ["Outcome", "Trainer"]

# A step's random numbers start from seed, step and rank; far apart, so that no two meet.
_STEP_STRIDE, _RANK_STRIDE = 1_000_003, 7_919
_AHEAD = 4
"""Batches made ahead of time."""

E = TypeVar("E")
B = TypeVar("B")


class _Placed(NamedTuple, Generic[B]):
    """A batch, and its place in the data: epoch, and number within it from 1."""

    batch: B
    epoch: int
    number: int


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        steps: Steps done.
        best: Best nDCG@10 on the held-out part, -1 without one.
        best_step: Step of it.
        first: Measurements before the first step; empty without a held-out part.
        last: The newest measurements.
        seconds: Time of the run, parts before a resumption included.
        skipped: Bad examples left out of the last epoch.
    """

    steps: int
    best: float
    best_step: int
    first: dict[str, float]
    last: dict[str, float]
    seconds: float
    skipped: int


class Trainer(Generic[E, B]):
    """One run: a task, an output folder, a device."""

    def __init__(
        self, task: Task[E, B], output: Path, *, device: torch.device | None = None
    ) -> None:
        """Checks what can be checked before anything is loaded.

        Args:
            task: What is trained, and by which settings.
            output: Folder for checkpoints, log and model.
            device: Where to train; None for this rank's CUDA device if there is one, else the CPU.

        Raises:
            ConfigError: Settings that cannot work here.
        """
        self.task, self.config, self.output = task, task.config, Path(output)
        self.device = device or _default_device()
        if self.config.run.precision == "float16" and self.device.type != "cuda":
            raise ConfigError(
                "`run.precision: float16` needs a GPU, whose gradients are scaled; use bfloat16 or "
                f"float32 on {self.device.type}."
            )
        self.first_weights: dict[str, Tensor] = {}
        self.mean: WeightMean | None = None

    def run(self, progress: Callable[[int, int, dict[str, float]], None] | None = None) -> Outcome:
        """Trains until the last step, resuming from the newest checkpoint of the output folder.

        Args:
            progress: Called after each step with steps done, steps in all and the step's numbers.

        Raises:
            ConfigError: A checkpoint of other settings, or settings that cannot work.
            InputError: Bad data; the message names file and line.
        """
        started = time.perf_counter()
        with process_group(self.device):
            self._load()
            total = self._total_steps()
            position = self._resume()
            if position.step > total:
                raise ConfigError(
                    f"the run in {self.output} has {position.step} steps behind it, and {total} "
                    "were asked for; ask for more to lengthen it, or choose another output folder."
                )
            before = position.seconds
            first = self._first_measurements(position)
            with RunLog(self.output, step=position.step) if rank() == 0 else nullcontext() as log:
                last = dict(first)
                for group in self._steps(position, total):
                    numbers = self._step(group, position, total)
                    position.step += 1
                    position.seconds = before + time.perf_counter() - started
                    numbers["seconds"] = position.seconds
                    is_last = position.step == total
                    if log is not None and (
                        position.step % self.config.run.log_every == 0 or is_last
                    ):
                        log.write(position.step, **numbers)
                    if self._is_due(self.config.evaluation.every, position.step, is_last):
                        last = self._evaluate(position, log) or last
                    if self._is_due(self.config.run.checkpoint_every, position.step, is_last):
                        self._save(position)
                    if progress is not None:
                        progress(position.step, total, numbers)
            self._finish(position)
        seconds = before + time.perf_counter() - started
        return Outcome(
            position.step,
            position.best,
            position.best_step,
            first,
            last,
            seconds,
            self.task.data.skipped,
        )

    # Setting up

    def _load(self) -> None:
        config = self.config
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        share_of_rank(range(config.run.batch_size), rank=rank(), world_size=world_size())
        self.task.load(self.output, self.device)
        if config.model.trained_share < 1:
            self.first_weights = {
                name: tensor.detach().clone() for name, tensor in self.task.state().items()
            }
        self.parameters = self.task.parameters
        self.optimiser = make_optimiser(self.parameters.items(), config.optimiser)
        is_scaled = config.run.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_scaled)
        if config.optimiser.ema_decay:
            self.mean = WeightMean(self.parameters, config.optimiser.ema_decay)

    def _total_steps(self) -> int:
        run = self.config.run
        if run.steps:
            return run.steps
        return max(1, run.epochs * sum(1 for _ in self.task.data.epoch(0)) // run.accumulate)

    def _resume(self) -> Position:
        folder = find_checkpoint(self.output)
        if folder is None:
            return Position()
        position, state = load_checkpoint(folder, self.config.to_dict(), self.device)
        with torch.no_grad():
            for name, parameter in self.task.state().items():
                parameter.copy_(state["model"][name])
        if self.mean is not None:
            self.mean.load(state["mean"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        return position

    def _first_measurements(self, position: Position) -> dict[str, float]:
        if not self.task.is_measured or rank() != 0:
            return {}
        for row in read_log(self.output / LOG_FILE) if position.step else ():
            if row.pop("step") == 0 and "ndcg@10" in row:
                return row
        with self._as_written():
            measured = self.task.measure()
        with RunLog(self.output, step=position.step) as log:
            log.write(0, **measured)
        return measured

    # One step

    def _steps(self, position: Position, total: int) -> Iterator[list[B]]:
        """Batches of every step that is left, `accumulate` each."""
        group: list[B] = []
        for batch, epoch, number in ahead(self._stream(position), _AHEAD):
            if position.step >= total:
                return
            group.append(batch)
            if len(group) == self.config.run.accumulate:
                # Before the step: a checkpoint after it goes on behind these batches.
                position.epoch, position.batch = epoch, number
                yield group
                group = []
                if position.step >= total:
                    return

    def _stream(self, position: Position) -> Iterator[_Placed[B]]:
        epoch, skip = position.epoch, position.batch
        while True:
            for number, batch in enumerate(self.task.batches(epoch, skip), skip + 1):
                yield _Placed(batch, epoch, number)
            epoch, skip = epoch + 1, 0

    def _step(self, group: list[B], position: Position, total: int) -> dict[str, float]:
        config = self.config
        factor = learning_rate_factor(
            position.step,
            total=total,
            warmup=config.optimiser.warmup_steps,
            schedule=config.optimiser.schedule,
        )
        for options in self.optimiser.param_groups:
            options["lr"] = options["peak"] * factor
        self.optimiser.zero_grad(set_to_none=True)
        self.task.set_training(True)
        warm = config.loss.regulariser_warmup
        regulariser = min(1.0, (position.step / warm) ** 2) if warm else 1.0
        numbers: dict[str, float] = {}
        for i, batch in enumerate(group):
            seed = config.run.seed + _STEP_STRIDE * (position.step * len(group) + i + 1)
            with seeded(seed + _RANK_STRIDE * rank(), self.device):
                parts = self.task.learn(
                    batch, self.scaler, regulariser=regulariser, share=1 / len(group)
                )
            for name, value in parts.items():
                numbers[name] = numbers.get(name, 0.0) + value / len(group)
        self.task.set_training(False)
        average_gradients(self.parameters.values())
        self.scaler.unscale_(self.optimiser)
        limit = config.optimiser.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.mean is not None:
            self.mean.update(position.step + 1)
        return {
            **self._over_ranks(numbers),
            "grad_norm": float(norm),
            "lr": factor * config.optimiser.lr,
        }

    # Around the steps

    def _is_due(self, every: int, step: int, is_last: bool) -> bool:
        return is_last or (every > 0 and step % every == 0)

    def _evaluate(self, position: Position, log: RunLog | None) -> dict[str, float]:
        """Measures on rank 0; every rank learns the outcome, so that all stop together."""
        if not self.task.is_measured:
            return {}
        with self._as_written():
            measured = self.task.measure() if rank() == 0 else {}
        quality = torch.tensor(
            measured.get("ndcg@10", 0.0), dtype=torch.float64, device=self.device
        )
        quality = mean_over_ranks(quality) * world_size()
        if float(quality) > position.best:
            position.best, position.best_step = float(quality), position.step
            if rank() == 0:
                with self._as_written():
                    self.task.save(self.output)
        if log is not None:
            log.write(position.step, **measured)
        return measured

    def _save(self, position: Position) -> None:
        if rank() != 0:
            return
        state = {
            "model": dict(self.task.state()),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.mean is not None:
            state["mean"] = self.mean.means
        save_checkpoint(self.output, position, state, self.config.to_dict())

    def _finish(self, position: Position) -> None:
        """Leaves the best model where there is a held-out part, else the last."""
        if rank() == 0 and (not self.task.is_measured or position.best < 0):
            with self._as_written():
                self.task.save(self.output)

    @contextmanager
    def _as_written(self) -> Iterator[None]:
        """Puts the weights that are measured and written in place of those that are trained."""
        share = self.config.model.trained_share
        with (
            nullcontext() if self.mean is None else self.mean.applied(),
            mixed_weights(self.task.state(), self.first_weights, share),
        ):
            yield

    def _over_ranks(self, numbers: dict[str, float]) -> dict[str, float]:
        if world_size() == 1:
            return numbers
        values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.device)
        return dict(zip(numbers, mean_over_ranks(values).tolist(), strict=True))


def _default_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
