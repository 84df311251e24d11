"""Several ranks equal one: gradients of every objective, and a whole training run."""

import socket

import pytest
import torch
import training_oracle
import training_samples

from vdr_db import SparseEncoder


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
