"""A small model and small data for training tests, and a worker that several ranks can run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import model_folders
import torch

WORDS = [word for word in model_folders.WORDS if not word.startswith("##")]


def write_pairs(path: Path, count: int, *, negatives: int = 0, seed: int = 0) -> Path:
    """Queries of two words, positives that hold both among others, random negatives."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        words = draw.sample(WORDS, 6)
        cells = [" ".join(words[:2]), " ".join(draw.sample(words, 6))]
        cells += [" ".join(draw.sample(WORDS, draw.randint(3, 7))) for _ in range(negatives)]
        lines.append("\t".join(cells) + "\n")
    path.write_text("".join(lines), "utf-8")
    return path


def settings(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration that trains the small model on the small data for a few steps."""
    model = folder / "bert"
    if not model.exists():
        model_folders.write_bert(model)
        write_pairs(folder / "pairs.tsv", 120, negatives=1)
    basis: dict[str, Any] = {
        "model": {
            "start": str(model),
            "activation": "elu1p",
            "k": 20,
            "query_k": 10,
            "max_length": 12,
            "query_max_length": 8,
        },
        "data": {"train": [{"path": str(folder / "pairs.tsv")}], "negatives": 1, "bucket": 2},
        "loss": {"objective": "vdr", "temperature": 10.0},
        "optimiser": {"lr": 1e-3},
        "run": {"steps": 5, "batch_size": 8, "log_every": 1, "dropout": 0.0},
    }
    for section, values in changes.items():
        if isinstance(values, dict):
            basis[section] = {**basis.get(section, {}), **values}
        else:
            basis[section] = values
    return basis


def train(configuration: dict[str, Any], output: Path, *, kill_at: int = 0, **options: Any) -> Any:
    """Runs the trainer in this process; kills it for good after a step if asked to.

    Options are those of `TextTask`.
    """
    from vdr_db.training.config import build_config
    from vdr_db.training.images.task import ImageTask
    from vdr_db.training.texts import TextTask
    from vdr_db.training.trainer import Trainer

    def progress(step: int, total: int, numbers: dict[str, float]) -> None:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    config = build_config(configuration)
    task: Any = TextTask(config, **options) if config.image is None else ImageTask(config)
    return Trainer(task, output, device=torch.device("cpu")).run(progress)


def run_worker(
    job: dict[str, Any], *, ranks: int = 1, port: int = 0, threads: int = 1
) -> list[int]:
    """Exit codes of processes that each run `job`, as torchrun would start them."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MASTER_ADDR": "127.0.0.1"}
    job = {**job, "threads": threads}
    processes = []
    for rank in range(ranks):
        ranked = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        own = {name: str(value) for name, value in ranked.items()} if ranks > 1 else {}
        command = [sys.executable, "-W", "error::UserWarning:vdr_db", __file__, json.dumps(job)]
        processes.append(subprocess.Popen(command, env={**environment, **own}))
    return [process.wait(timeout=120) for process in processes]


def main() -> None:
    """One rank's part of a job."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    if job["what"] == "train":
        train(job["settings"], Path(job["output"]), kill_at=job.get("kill_at", 0))
    else:
        import training_oracle

        training_oracle.save_gradients(job)


if __name__ == "__main__":
    main()
