"""Loss curves of the presets and of our own recipes, against those of commit 558bc49.

Each setting file is run for 50 steps on small data with a small model, on one thread; what makes a
run large (paths, sizes of models, batches and steps, bfloat16) is replaced, the rest is as written.
Matrix libraries choose their kernels by processor: on the one that the curves were recorded on they
must agree bit for bit, elsewhere to 1e-3.
"""

from __future__ import annotations

import json
from pathlib import Path

import model_folders
import pytest
import torch
import training_samples
import yaml
from shape_pictures import write_shapes

from vdr_db.training.watch import read_log

ROOT = Path(__file__).parents[2]
CURVES = ROOT / "tests" / "data" / "loss_curves.json"
FILES = {
    **{name: f"vdr_db/training/presets/{name}.yaml" for name in ("dpr", "splade", "svdr-msmarco")},
    "vdr-msmarco": "vdr_db/training/presets/vdr-msmarco.yaml",
    "vdr-cross-modal": "vdr_db/training/presets/vdr-cross-modal.yaml",
    "train_tiny": "scripts/train_tiny.yaml",
    "train_tiny_image": "scripts/train_tiny_image.yaml",
}
SMALL_IMAGE = {"size": 32, "patch_size": 8, "hidden_size": 32, "layers": 1, "heads": 4}


def where() -> str:
    """What the last bits depend on."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def settings_of(name: str, folder: Path) -> dict:
    """The settings of a file, on the small data."""
    settings = yaml.safe_load((ROOT / FILES[name]).read_text("utf-8"))
    model, run, data = settings["model"], settings["run"], settings["data"]
    sizes = {"k": 20, "query_k": 10, "max_length": 12, "query_max_length": 8}
    model |= {key: value for key, value in sizes.items() if model.get(key)}
    model |= {"start": str(folder / "bert"), "encode_max_length": 12, "vocabulary": "all"}
    if "image" in settings:
        data["train"] = [{"path": str(folder / "train.jsonl")}]
        settings["image"] |= {**SMALL_IMAGE, "intermediate_size": 64, "k": 30, "stem": ""}
        if settings["image"]["body"] == "hybrid":  # its stem is no small model
            for key in ("contrast", "dropout", "patch_dropout", "as_one_patch", "cache"):
                settings["image"].pop(key)
            settings["image"] |= {"body": "vit", "sampled_columns": 20, "views": 0}
    else:
        data["train"] = [{"path": str(folder / "pairs.tsv")}]
        data["negatives"] = 1
    for teacher in settings.get("teachers", ()):
        if "path" in teacher:
            teacher["path"] = str(folder / "bert")
    run |= {"steps": 50, "batch_size": 8, "precision": "float32", "log_every": 1, "threads": 1}
    run |= {"checkpoint_every": 50, "seed": 3}
    if run.get("chunk"):
        run["chunk"] = 3
    settings["optimiser"]["warmup_steps"] = 5
    settings.pop("evaluation", None)
    return settings


def curve(name: str, folder: Path) -> list[float]:
    """The loss of each step."""
    model_folders.write_bert(folder / "bert")
    training_samples.write_pairs(folder / "pairs.tsv", 120, negatives=1)
    write_shapes(folder, "train", each=24)
    threads = torch.get_num_threads()
    try:
        training_samples.train(settings_of(name, folder), folder / "run")
    finally:
        torch.set_num_threads(threads)
    return [row["loss"] for row in read_log(folder / "run" / "log.jsonl") if "loss" in row]


@pytest.mark.parametrize("name", FILES)
def test_losses_are_what_they_were(name, tmp_path):
    recorded = json.loads(CURVES.read_text("utf-8"))
    expected, found = recorded["curves"][name], curve(name, tmp_path)
    assert len(found) == 50
    if where() == recorded["where"]:
        assert found == expected
    else:
        assert found == pytest.approx(expected, rel=1e-3)
