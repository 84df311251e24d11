"""The training loop, from top to bottom in one file.

    batch of texts -> vectors of this rank -> loss over all ranks -> gradients -> mean over ranks
    -> clip -> AdamW step -> log, evaluate, checkpoint

`Trainer.run` is the loop, `vdr_db.training.learner` does one batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import ConfigError
from vdr_db.training.averaging import WeightMean, mixed_weights
from vdr_db.training.checkpoint import (
    Position,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from vdr_db.training.data import Batches, make_batch
from vdr_db.training.distributed import (
    average_gradients,
    mean_over_ranks,
    process_group,
    rank,
    world_size,
)
from vdr_db.training.examples import Source, read_examples
from vdr_db.training.learner import DTYPES, Learner
from vdr_db.training.models import (
    load_student,
    make_sides,
    save_model,
    set_dropout,
    trainable,
)
from vdr_db.training.objective import Objective
from vdr_db.training.prefetch import TokenBatch, ahead
from vdr_db.training.schedule import learning_rate_factor, make_optimiser
from vdr_db.training.settings import TrainConfig
from vdr_db.training.teachers import make_teachers
from vdr_db.training.watch import LOG_FILE, HeldOut, RunLog, read_log

__all__ = ["MODEL_FOLDER", "Outcome", "Trainer"]

MODEL_FOLDER = "model"
# A step's random numbers start from seed, step and rank; far apart, so that no two meet.
_STEP_STRIDE, _RANK_STRIDE = 1_000_003, 7_919


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
        stopped_early: Whether patience ran out.
        skipped: Bad examples left out of the last epoch.
    """

    steps: int
    best: float
    best_step: int
    first: dict[str, float]
    last: dict[str, float]
    seconds: float
    stopped_early: bool
    skipped: int


class Trainer:
    """One run: a configuration, an output folder, a device."""

    def __init__(
        self, config: TrainConfig, output: Path, *, device: torch.device | None = None
    ) -> None:
        """Checks what can be checked before anything is loaded.

        Args:
            config: All settings.
            output: Folder for checkpoints, log and model.
            device: Where to train; None for this rank's CUDA device if there is one, else the CPU.

        Raises:
            ConfigError: Settings that cannot work here.
        """
        self.config, self.output = config, Path(output)
        self.device = device or _default_device()
        if config.run.precision == "float16" and self.device.type != "cuda":
            raise ConfigError(
                "`run.precision: float16` needs a GPU, whose gradients are scaled; use bfloat16 or "
                f"float32 on {self.device.type}."
            )
        self.objective = Objective(config.loss)
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
            if self.config.optimiser.ema_decay:
                self.mean = WeightMean(self.parameters, self.config.optimiser.ema_decay)
            total = self._total_steps()
            position = self._resume()
            before = position.seconds
            first = self._first_measurements(position)
            with RunLog(self.output, step=position.step) if rank() == 0 else nullcontext() as log:
                last = dict(first)
                stopped = False
                for tokens in self._steps(position, total):
                    numbers = self._step(tokens, position, total)
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
                        patience = self.config.evaluation.patience
                        stopped = bool(patience) and position.stale >= patience
                    if self._is_due(self.config.run.checkpoint_every, position.step, is_last):
                        self._save(position)
                    if progress is not None:
                        progress(position.step, total, numbers)
                    if stopped:
                        break
            self._finish(position)
        seconds = before + time.perf_counter() - started
        return Outcome(
            position.step,
            position.best,
            position.best_step,
            first,
            last,
            seconds,
            stopped,
            self.batches.skipped,
        )

    # Setting up

    def _load(self) -> None:
        config = self.config
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.batches = Batches(
            [
                Source(Path(item.path), item.format, item.weight, item.split)
                for item in config.data.train
            ],
            config.run.batch_size,
            negatives=config.data.negatives,
            seed=config.run.seed,
            buffer=config.data.buffer,
            bucket=config.data.bucket,
            on_bad=config.data.on_bad,
        )
        if config.run.batch_size % world_size():
            raise ConfigError(
                f"`run.batch_size` must be a multiple of the {world_size()} ranks, got "
                f"{config.run.batch_size}."
            )
        self.encoder: SparseEncoder = load_student(config.model, self.device)
        set_dropout(self.encoder, config.run.dropout)
        if config.model.trained_share < 1:
            self.first_weights = {
                name: tensor.detach().clone() for name, tensor in self._all_parameters().items()
            }
        self.query_side, self.document_side = make_sides(self.encoder, config.model)
        self.parameters = trainable(self.encoder, freeze_embeddings=config.model.freeze_embeddings)
        self.optimiser = make_optimiser(self.parameters.items(), config.optimiser)
        is_scaled = config.run.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_scaled)
        self.held_out = HeldOut(config.evaluation) if config.evaluation.folder else None
        teachers = make_teachers(
            config.teachers,
            self.encoder,
            self._teacher_documents(),
            max_length=config.model.max_length,
            query_max_length=config.model.query_max_length,
        )
        sides = (self.query_side, self.document_side)
        self.learner = Learner(
            self.encoder, sides, self.objective, teachers, config.run, self.scaler
        )

    def _teacher_documents(self) -> Iterator[str]:
        for source in self.batches.sources:
            for example in read_examples(source, on_bad=lambda error: None):
                yield example.positives[0]

    def _total_steps(self) -> int:
        run = self.config.run
        if run.steps:
            return run.steps
        batches = sum(1 for _ in self.batches.epoch(0))
        return max(1, run.epochs * batches // run.accumulate)

    def _resume(self) -> Position:
        folder = find_checkpoint(self.output)
        if folder is None:
            return Position()
        position, state = load_checkpoint(folder, self.config.to_dict(), self.device)
        with torch.no_grad():
            for name, parameter in self._all_parameters().items():
                parameter.copy_(state["model"][name])
        if self.mean is not None:
            self.mean.load(state["mean"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        return position

    def _all_parameters(self) -> dict[str, Tensor]:
        return self.encoder.named_tensors()

    def _first_measurements(self, position: Position) -> dict[str, float]:
        if self.held_out is None or rank() != 0:
            return {}
        known = [
            row for row in read_log(self.output / LOG_FILE) if row["step"] == 0 and "ndcg@10" in row
        ]
        if position.step and known:
            return {name: value for name, value in known[0].items() if name != "step"}
        with self._as_written():
            measured = self._measure()
        with RunLog(self.output, step=position.step) as log:
            log.write(0, **measured)
        return measured

    # One step

    def _steps(self, position: Position, total: int) -> Iterator[list[TokenBatch]]:
        """Batches of every step that is left, `accumulate` each."""
        group: list[TokenBatch] = []
        stream = self._stream(position)
        for tokens in ahead(stream, self.config.data.prefetch):
            if position.step >= total:
                return
            group.append(tokens)
            if len(group) == self.config.run.accumulate:
                # Before the step: a checkpoint after it goes on behind these batches.
                position.epoch, position.batch = tokens.epoch, tokens.number
                yield group
                group = []
                if position.step >= total:
                    return

    def _stream(self, position: Position) -> Iterator[TokenBatch]:
        epoch, skip = position.epoch, position.batch
        tokenizer = self.encoder.tokenizer
        while True:
            for number, examples in enumerate(self.batches.epoch(epoch, skip=skip), skip + 1):
                batch = make_batch(examples, rank=rank(), world_size=world_size())
                yield TokenBatch(
                    batch,
                    tokenizer.encode(batch.queries),
                    tokenizer.encode(batch.documents),
                    epoch,
                    number,
                )
            epoch, skip = epoch + 1, 0

    def _step(self, group: list[TokenBatch], position: Position, total: int) -> dict[str, float]:
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
        self._set_training(True)
        warm = config.loss.regulariser_warmup
        regulariser = min(1.0, (position.step / warm) ** 2) if warm else 1.0
        numbers: dict[str, float] = {}
        for i, tokens in enumerate(group):
            seed = config.run.seed + _STEP_STRIDE * (position.step * len(group) + i + 1)
            with torch.random.fork_rng(self._cuda_devices()):
                torch.manual_seed(seed + _RANK_STRIDE * rank())
                parts = self.learner.learn(tokens, regulariser=regulariser, share=1 / len(group))
            for name, value in parts.items():
                numbers[name] = numbers.get(name, 0.0) + value / len(group)
        self._set_training(False)
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

    def _measure(self) -> dict[str, float]:
        assert self.held_out is not None
        if self.config.loss.objective == "dpr":
            return self.held_out.measure_dense(self.query_side, self.document_side)
        return self.held_out.measure(self.encoder)

    def _evaluate(self, position: Position, log: RunLog | None) -> dict[str, float]:
        """Measures on rank 0; every rank learns the outcome, so that all stop together."""
        if self.held_out is None:
            return {}
        with self._as_written():
            measured = self._measure() if rank() == 0 else {}
        quality = torch.tensor(
            measured.get("ndcg@10", 0.0), dtype=torch.float64, device=self.device
        )
        quality = mean_over_ranks(quality) * world_size()
        if float(quality) > position.best:
            position.best, position.best_step, position.stale = float(quality), position.step, 0
            if rank() == 0:
                with self._as_written():
                    self._save_model()
        else:
            position.stale += 1
        if log is not None:
            log.write(position.step, **measured)
        return measured

    def _save(self, position: Position) -> None:
        if rank() != 0:
            return
        state = {
            "model": dict(self._all_parameters()),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.mean is not None:
            state["mean"] = self.mean.means
        save_checkpoint(
            self.output, position, state, self.config.to_dict(), self.config.run.keep_checkpoints
        )

    def _finish(self, position: Position) -> None:
        """Leaves the best model where there is a held-out part, else the last."""
        if rank() == 0 and (self.held_out is None or position.best < 0):
            with self._as_written():
                self._save_model()

    def _save_model(self) -> None:
        dtype = DTYPES[self.config.model.save_dtype]
        save_model(self.encoder, self.output / MODEL_FOLDER, dtype)

    @contextmanager
    def _as_written(self) -> Iterator[None]:
        """Puts the weights that are measured and written in place of those that are trained."""
        share = self.config.model.trained_share
        with (
            nullcontext() if self.mean is None else self.mean.applied(),
            mixed_weights(self._all_parameters(), self.first_weights, share),
        ):
            yield

    def _set_training(self, mode: bool) -> None:
        for tower in (self.encoder.document_tower, self.encoder.query_tower):
            tower.train(mode)

    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    def _over_ranks(self, numbers: dict[str, float]) -> dict[str, float]:
        if world_size() == 1:
            return numbers
        values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.device)
        return dict(zip(numbers, mean_over_ranks(values).tolist(), strict=True))


def _default_device() -> torch.device:
    import os

    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
