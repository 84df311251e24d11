"""Moving averages of weights: by their formula, in the model that is written, and over a kill."""

import shutil

import model_folders
import pytest
import torch
from shape_pictures import write_shapes
from training_samples import settings, train

from vdr_db import SparseEncoder
from vdr_db.encoders.cross_modal import CrossModalEncoder
from vdr_db.errors import ConfigError
from vdr_db.training import checkpoint
from vdr_db.training.config import build_config
from vdr_db.training.images.task import ImageTask
from vdr_db.training.trainer import Trainer
from vdr_db.training.watch import read_log


def weights(output):
    return SparseEncoder.from_pretrained(output / "model").named_tensors()


def losses(output):
    return [row["loss"] for row in read_log(output / "log.jsonl") if "loss" in row]


def averaged(states, decay):
    """The mean of states 0, 1, ... by the formula, step by step in float64."""
    means = {name: tensor.double() for name, tensor in states[0].items()}
    for step, state in enumerate(states[1:], 1):
        d = min(decay, (step - 1) / (step + 3))
        means = {name: d * mean + (1 - d) * state[name] for name, mean in means.items()}
    return means


@pytest.mark.parametrize("decay", [0.2, 0.9])
def test_the_written_model_is_the_mean_of_the_steps(tmp_path, decay, monkeypatch):
    """Training itself must not see the mean. At 0.2 the slow start ends with the second step."""
    monkeypatch.setattr(checkpoint, "KEPT", 5)
    run = {"steps": 5, "checkpoint_every": 1}
    train(settings(tmp_path, run=run), tmp_path / "plain")
    train(settings(tmp_path, run=run, optimiser={"ema_decay": decay}), tmp_path / "mean")
    states = [SparseEncoder.from_pretrained(tmp_path / "bert", activation="elu1p").named_tensors()]
    for step in range(1, 6):
        file = tmp_path / "plain" / f"checkpoint-{step}" / "state.pt"
        states.append(torch.load(file, weights_only=True)["state"]["model"])
    expected = averaged(states, decay)
    for name, tensor in weights(tmp_path / "mean").items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-6, msg=name)
    last = weights(tmp_path / "plain")
    assert any((last[name] - expected[name]).abs().max() > 1e-5 for name in expected)
    assert losses(tmp_path / "plain") == losses(tmp_path / "mean")


def test_a_resumed_run_goes_on_with_its_mean(tmp_path):
    configuration = settings(
        tmp_path,
        optimiser={"ema_decay": 0.9},
        run={"steps": 4, "checkpoint_every": 2},
    )
    train(configuration, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    shutil.rmtree(tmp_path / "resumed" / "model")
    train(configuration, tmp_path / "resumed")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "resumed")[name], tensor), name


def test_a_mean_goes_with_a_share_of_the_first_weights(tmp_path):
    """The share is that of the mean."""
    optimiser = {"ema_decay": 0.5}
    train(settings(tmp_path, optimiser=optimiser), tmp_path / "mean")
    train(
        settings(tmp_path, optimiser=optimiser, model={"trained_share": 0.25}), tmp_path / "quarter"
    )
    first = SparseEncoder.from_pretrained(tmp_path / "bert", activation="elu1p").named_tensors()
    mean = weights(tmp_path / "mean")
    for name, tensor in weights(tmp_path / "quarter").items():
        expected = 0.25 * mean[name] + 0.75 * first[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_beyond_its_bounds_is_refused(tmp_path, decay):
    with pytest.raises(ConfigError, match=r"ema_decay. must be in \[0, 1\), got"):
        train(settings(tmp_path, optimiser={"ema_decay": decay}), tmp_path / "out")


@pytest.mark.parametrize("objective", ["vdr", "dpr"])
def test_images_are_measured_and_written_by_the_mean(tmp_path, objective, monkeypatch):
    monkeypatch.setattr(checkpoint, "KEPT", 3)
    model_folders.write_bert(tmp_path / "bert")
    write_shapes(tmp_path, "train", each=4)
    write_shapes(tmp_path, "unseen", each=1, seed=1)
    image = {
        "body": "vit",
        "size": 16,
        "patch_size": 8,
        "hidden_size": 32,
        "layers": 1,
        "heads": 4,
        "intermediate_size": 32,
        "projection": "own",
        "k": 30,
    }
    outputs = []
    for decay in (0.0, 0.9):
        config = build_config(
            {
                "model": {"start": str(tmp_path / "bert"), "activation": "elu1p", "k": 30},
                "image": image,
                "data": {"train": [{"path": str(tmp_path / "train.jsonl")}]},
                "loss": {"objective": objective, "temperature": 0.07},
                "optimiser": {"lr": 3e-3, "ema_decay": decay},
                "evaluation": {"folder": str(tmp_path / "unseen.jsonl")},
                "run": {
                    "steps": 3,
                    "batch_size": 8,
                    "log_every": 1,
                    "checkpoint_every": 1,
                },
            }
        )
        output = tmp_path / f"out-{decay}"
        task = ImageTask(config)
        task.load(output, torch.device("cpu"))
        first = {name: p.detach().clone() for name, p in task.parameters.items()}
        Trainer(ImageTask(config), output, device=torch.device("cpu")).run()
        outputs.append(output)
    plain, mean = outputs
    assert losses(plain) == losses(mean)
    states = [first]
    for step in range(1, 4):
        file = plain / f"checkpoint-{step}" / "state.pt"
        states.append(torch.load(file, weights_only=True)["state"]["model"])
    expected = averaged(states, 0.9)
    found = CrossModalEncoder.from_pretrained(mean / "model", device="cpu")
    if objective == "vdr":
        projection = found.image.tower.head.projection.double()
        truth = expected["image.head.projection"]
        torch.testing.assert_close(projection, truth, rtol=0, atol=1e-6)
    if objective == "dpr":
        heads = torch.load(mean / "dense.pt", weights_only=True)
        torch.testing.assert_close(
            heads["image"].double(), expected["dense.image"], rtol=0, atol=1e-6
        )
