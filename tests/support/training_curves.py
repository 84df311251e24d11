"""Loss curves of the published presets and of the recipe for images, on small data.

    PYTHONPATH=tests/support python tests/support/training_curves.py OUT.json

Each case is a preset or recipe as it stands, but for what makes it small: the first weights of a
test, few and short texts or images, batches of 8, 50 steps, one thread.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import model_folders
import numpy as np
import torch
import training_samples
from shape_pictures import write_shapes
from stem_weights import published_weights

from vdr_db.training.config import load_config

STEPS = 50
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SMALL = {
    "run.steps": str(STEPS),
    "run.batch_size": "8",
    "run.checkpoint_every": "0",
    "run.log_every": "1",
    "run.threads": "1",
    "evaluation": "{}",
}
TEXT = {
    "model.max_length": "24",
    "model.query_max_length": "12",
    "model.encode_max_length": "32",
    "optimiser.lr": "1e-3",
    "optimiser.warmup_steps": "5",
    "run.chunk": "6",
}
KEPT = {"model.k": "20", "model.query_k": "10"}
IMAGE = {
    "model.encode_max_length": "32",
    "model.max_length": "12",
    "model.query_max_length": "12",
    "image.size": "32",
    "image.patch_size": "8",
    "image.hidden_size": "32",
    "image.layers": "1",
    "image.heads": "4",
    "image.intermediate_size": "64",
    "image.k": "20",
    "optimiser.lr": "3e-3",
    "optimiser.warmup_steps": "5",
}
WARM_UP, MAIN = "vdr-mini images warm-up", "vdr-mini images"
TRAINED_TEXT = {"image.train_text": "true", "image.projection": "text"}
"""The text encoder learns, too: that of the test starts at random."""
CASES = (
    "vdr-msmarco",
    "svdr-msmarco",
    "splade",
    "dpr",
    "vdr-cross-modal",
    WARM_UP,
    MAIN,
    "vdr-mini images dense",
)


def machine() -> dict[str, str]:
    """What the last bits of a float32 sum depend on."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text("utf-8", "replace").splitlines() if known.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def recipe(name: str) -> ModuleType:
    """One of the scripts that train a model, as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def curve(case: str, folder: Path) -> dict[str, list[float]]:
    """Losses and norms of gradients, step by step.

    Args:
        case: One of `CASES`; the main stage of `vdr-mini images` runs its warm-up first.
        folder: Of data and runs, the same for all cases.
    """
    _prepare(folder)
    bert = {"model.start": str(folder / "bert")}
    shapes = {"data.train": json.dumps([{"path": str(folder / "train.jsonl")}])}
    settings: Path | str = case
    changes: Mapping[str, str]
    if case == "vdr-cross-modal":
        changes = {**IMAGE, **KEPT, **bert, **shapes}
    elif case.startswith(MAIN):
        script = recipe("train_mini_image")
        settings = SCRIPTS / "train_mini_image.yaml"
        warm = _output(folder, WARM_UP)
        if case == MAIN and not warm.exists():
            curve(WARM_UP, folder)
        stages = {
            WARM_UP: script.WARM_UP,
            MAIN: {"image.start": str(warm / "model"), **TRAINED_TEXT},
            "vdr-mini images dense": {**script.DENSE, **TRAINED_TEXT},
        }
        own = {
            **bert,
            "model.max_length": "24",
            "model.query_max_length": "12",
            "model.encode_max_length": "32",
            "model.query_k": "64",
            "image.stem": str(folder / "stem.pth"),
            "image.cache": str(folder / "states"),
            "image.size": "64",
            "image.hidden_size": "64",
            "image.intermediate_size": "64",
        }
        changes = {**stages[case], **own, **shapes}
    else:
        data = [{"path": str(folder / "pairs.jsonl"), "format": "dpr"}]
        kept = {} if case == "splade" else KEPT
        changes = {**TEXT, **kept, **bert, "data.train": json.dumps(data)}
    config = load_config(settings, {**changes, **SMALL})
    output = _output(folder, case)
    threads = torch.get_num_threads()
    try:
        training_samples.train(config.to_dict(), output)
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS
    return {name: [row[name] for row in rows] for name in ("loss", "grad_norm")}


def _output(folder: Path, case: str) -> Path:
    return folder / case.replace(" ", "-")


def _prepare(folder: Path) -> None:
    """Writes first weights and data, once."""
    if (folder / "stem.pth").exists():
        return
    model_folders.write_bert(folder / "bert")
    write_shapes(folder, "train", each=6)
    tsv = training_samples.write_pairs(folder / "pairs.tsv", 120, negatives=1)
    rows = []
    for line in tsv.read_text("utf-8").splitlines():
        query, positive, negative = line.split("\t")
        texts = {"positive_ctxs": [{"text": positive}], "hard_negative_ctxs": [{"text": negative}]}
        rows.append(json.dumps({"question": query, **texts}))
    (folder / "pairs.jsonl").write_text("\n".join(rows), "utf-8")
    torch.save(published_weights(), folder / "stem.pth")


def main() -> None:
    """Writes all curves, and what they depend on, to a file."""
    with tempfile.TemporaryDirectory() as folder:
        curves = {case: curve(case, Path(folder)) for case in CASES}
    content = json.dumps({"machine": machine(), "curves": curves}, indent=1)
    Path(sys.argv[1]).write_text(content + "\n", "utf-8")


if __name__ == "__main__":
    main()
