"""`vdr-db train` and `vdr-db mine`: a configuration to a model, examples to hard negatives.

Several processes: `torchrun --nproc-per-node N -m vdr_db.cli train run.yaml --out FOLDER`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vdr_db.cli.exits import DONE
from vdr_db.cli.show import progress, say, show_json, show_text
from vdr_db.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from vdr_db.training.examples import Example
    from vdr_db.training.images.data import ImageExample
    from vdr_db.training.images.task import ImageBatch
    from vdr_db.training.negatives import Ranker
    from vdr_db.training.texts import TokenBatch
    from vdr_db.training.trainer import Outcome, Trainer

__all__ = ["add_mine_arguments", "add_train_arguments", "run_mine", "run_train"]

BM25 = "bm25"
SECONDS_BETWEEN_LINES = 30.0
_Tell = Callable[[str, int, int, Mapping[str, float]], None]
"""Takes what is done, how much of it, how much there is, and numbers such as the loss."""


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vdr-db train`."""
    parser.add_argument("config", help="YAML file, or the name of a preset")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="checkpoints, log and model; a run that was stopped goes on from here",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value for a setting, such as run.steps=300; repeat for more",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")


def run_train(arguments: argparse.Namespace) -> int:
    """Trains; says on stdout how it went."""
    import torch

    from vdr_db.training.config import load_config
    from vdr_db.training.distributed import launched_rank
    from vdr_db.training.images.task import ImageTask
    from vdr_db.training.model_card import write_model_card
    from vdr_db.training.models import MODEL_FOLDER
    from vdr_db.training.plots import plot_run
    from vdr_db.training.texts import TextTask
    from vdr_db.training.trainer import Trainer
    from vdr_db.training.watch import LOG_FILE, read_log

    config = load_config(arguments.config, _overrides(arguments.set))
    if find_spec("matplotlib") is None:
        say("vdr-db: no plot will be drawn: matplotlib is missing, pip install 'vdr-db[train]'")
    device = torch.device(arguments.device) if arguments.device else None
    trainer: Trainer[Example, TokenBatch] | Trainer[ImageExample, ImageBatch]
    with _told("steps") as tell:
        if config.image is None:
            trainer = Trainer(TextTask(config), arguments.out, device=device)
        else:
            task = ImageTask(config, on_states=lambda done, total: tell("images", done, total, {}))
            trainer = Trainer(task, arguments.out, device=device)
        if launched_rank():
            trainer.run()
            return DONE
        outcome = trainer.run(lambda *step: tell("train", *step))
    model = arguments.out / MODEL_FOLDER
    with suppress(MissingExtraError):  # told at the start
        plot_run(read_log(arguments.out / LOG_FILE), arguments.out / "run.png")
    write_model_card(model, config, outcome, command=shlex.join(["vdr-db", *sys.argv[1:]]))
    _report(outcome, model, as_json=arguments.json)
    return DONE


def add_mine_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vdr-db mine`."""
    parser.add_argument("data", type=Path, help="examples: .tsv, .jsonl or a BEIR folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .jsonl file")
    parser.add_argument("--split", default="train", help="of a BEIR folder (default: train)")
    parser.add_argument(
        "--model",
        default=BM25,
        metavar="NAME_OR_FOLDER",
        help=f"ranker: {BM25}, or a sparse encoder through the embedded store (default: {BM25})",
    )
    parser.add_argument("--negatives", type=int, default=8, metavar="N", help="of each query")
    parser.add_argument(
        "--depth", type=int, default=50, metavar="N", help="hits looked at (default: 50)"
    )
    parser.add_argument(
        "--skip", type=int, default=0, metavar="N", help="best hits left out (default: 0)"
    )
    parser.add_argument(
        "--scores", action="store_true", help="keep the ranker's scores for distillation"
    )
    parser.add_argument(
        "--arrange",
        type=int,
        default=0,
        metavar="N",
        help="write examples in groups of N that are hard for each other",
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="count bad lines and leave them out"
    )


def run_mine(arguments: argparse.Namespace) -> int:
    """Mines; says on stdout how many examples were written."""
    from vdr_db.errors import InputError
    from vdr_db.training.examples import Source, read_examples
    from vdr_db.training.negatives import arrange, mine, write_scored

    skipped: list[InputError] = []
    examples = list(
        read_examples(
            Source(arguments.data, split=arguments.split),
            on_bad=skipped.append if arguments.skip_bad else None,
        )
    )
    with _told("queries") as tell:
        mined = mine(
            examples,
            lambda documents: _ranker(arguments.model, documents),
            count=arguments.negatives,
            depth=arguments.depth,
            skip=arguments.skip,
            with_scores=arguments.scores,
            progress=lambda done, total: tell("mine", done, total, {}),
        )
        ready = arrange(list(mined), arguments.arrange) if arguments.arrange else mined
        written = write_scored(ready, arguments.out)
    result = {"examples": written, "skipped": len(skipped), "file": str(arguments.out)}
    if arguments.json:
        show_json(result)
    else:
        show_text(f"{written:,} examples, {len(skipped):,} bad lines left out: {arguments.out}")
    return DONE


def _ranker(model: str, documents: Sequence[str]) -> Ranker:
    from vdr_db.training.negatives import Bm25Ranker, ModelRanker

    if model == BM25:
        return Bm25Ranker(documents)
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.training.models import start_folder

    return ModelRanker(documents, SparseEncoder.from_pretrained(start_folder(model)))


def _overrides(pairs: Sequence[str]) -> dict[str, str]:
    overrides = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found or not key:
            raise ConfigError(f"--set must be KEY=VALUE, such as run.steps=300, got {pair!r}.")
        overrides[key] = value
    return overrides


def _report(outcome: Outcome, model: Path, *, as_json: bool) -> None:
    if as_json:
        show_json(
            {
                "steps": outcome.steps,
                "seconds": round(outcome.seconds, 1),
                "skipped": outcome.skipped,
                "first": outcome.first,
                "last": outcome.last,
                "best_ndcg@10": outcome.best if outcome.best >= 0 else None,
                "best_step": outcome.best_step,
                "model": str(model),
            }
        )
        return
    show_text(f"{outcome.steps} steps in {outcome.seconds / 60:.1f} minutes -> {model}")
    if outcome.first:
        show_text(
            f"held-out nDCG@10: {outcome.first['ndcg@10']:.3f} before, {outcome.best:.3f} at step "
            f"{outcome.best_step}"
        )
    if outcome.skipped:
        show_text(f"{outcome.skipped} bad examples were left out of the last epoch")


@contextmanager
def _told(unit: str) -> Iterator[_Tell]:
    """Something to tell progress to: a bar on a terminal, a line now and then elsewhere."""
    with progress(None, unit, "") as bar:
        started = shown = time.monotonic()

        def tell(name: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
            nonlocal started, shown
            values = {name: f"{numbers[name]:.4g}" for name in ("loss", "lr") if name in numbers}
            now = time.monotonic()
            if not bar.disable:
                if bar.total != total:
                    bar.reset(total)
                bar.set_description(name, refresh=False)
                bar.set_postfix(values, refresh=False)
                bar.update(done - bar.n)
            elif done == total or now - shown >= SECONDS_BETWEEN_LINES:
                shown, left = now, (now - started) / max(done, 1) * (total - done)
                told = "  ".join(f"{name} {value}" for name, value in values.items())
                say(f"{name} {done}/{total} {unit}  {told}  {left / 60:.0f} min left")
            if done == total:
                started = now

        yield tell
