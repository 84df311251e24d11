"""Several ranks equal one: gradients of every objective, and a whole training run."""

import socket

import pytest
import torch
import training_oracle
import training_samples
from model_folders import write_bert
from shape_pictures import write_shapes

from vdr_db import CrossModalEncoder, SparseEncoder


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_ranks_have_the_gradients_of_one_big_batch(tmp_path, port):
    job = {"what": "gradients", "output": str(tmp_path / "gradients.pt")}
    assert training_samples.run_worker(job, ranks=2, port=port) == [0, 0]
    of_two = torch.load(tmp_path / "gradients.pt")
    for case in training_oracle.CASES:
        expected = training_oracle.gradients(case)
        for got, wanted in zip(of_two[case], expected, strict=True):
            assert wanted.abs().max() > 1e-4 or case == "dpr", case
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9, msg=case)


def test_two_ranks_train_as_one(tmp_path, port):
    """Parameters after five steps of the same global batches, within 1e-5."""
    # Some gradients are 0 but for rounding (a bias of all keys cancels in the softmax), and Adam
    # scales whatever is there up to 1; a larger epsilon leaves them 0.
    settings = training_samples.settings(
        tmp_path,
        loss={"kl": 0.1},
        teachers=[{"kind": "bm25"}],
        optimiser={"lr": 1e-3, "eps": 1e-3},
    )
    training_samples.train(settings, tmp_path / "one")
    job = {"what": "train", "settings": settings, "output": str(tmp_path / "two")}
    assert training_samples.run_worker(job, ranks=2, port=port) == [0, 0]
    start = SparseEncoder.from_pretrained(settings["model"]["start"], activation="elu1p")
    one, two = (
        SparseEncoder.from_pretrained(tmp_path / name / "model").named_tensors()
        for name in ("one", "two")
    )
    moved = 0.0
    for name, tensor in start.named_tensors().items():
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5, msg=name)
        moved = max(moved, float((one[name] - tensor).detach().abs().max()))
    assert moved > 1e-3, "training must have changed something"


@pytest.mark.parametrize(
    "image",
    [{"sampled_columns": 40}, {"train_text": True}],
    ids=["sampled columns", "trained texts"],
)
def test_two_ranks_train_on_images_as_one(tmp_path, port, image):
    """The same with images: all ranks score the same columns, whichever are drawn."""
    write_bert(tmp_path / "bert")
    write_shapes(tmp_path, "train", each=6)
    sizes = {"size": 32, "patch_size": 8, "hidden_size": 32, "layers": 1, "heads": 4}
    settings = {
        "model": {"start": str(tmp_path / "bert"), "activation": "elu1p", "k": 30, "query_k": 20},
        "image": {"body": "vit", "projection": "own", "intermediate_size": 64, **sizes, **image},
        "data": {"train": [{"path": str(tmp_path / "train.jsonl")}]},
        "loss": {"objective": "vdr", "temperature": 0.07},
        "optimiser": {"lr": 1e-3, "eps": 1e-3},
        "run": {"steps": 5, "batch_size": 8, "dropout": 0.0},
    }
    training_samples.train(settings, tmp_path / "one")
    job = {"what": "train", "settings": settings, "output": str(tmp_path / "two")}
    assert training_samples.run_worker(job, ranks=2, port=port) == [0, 0]
    one, two = (
        CrossModalEncoder.from_pretrained(tmp_path / name / "model", device="cpu")
        for name in ("one", "two")
    )
    sides = {"text": "document_tower", "image": "tower"}
    for side, tower in sides.items():
        expected = getattr(getattr(one, side), tower).state_dict()
        found = getattr(getattr(two, side), tower).state_dict()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)
