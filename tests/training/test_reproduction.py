"""Published presets and both models' recipes learn as they did: loss curves on 50 steps.

The curves in `tests/data/training_curves.json` were recorded at commit 43f20a4, before the trainer
took a task. On the same processor, torch and NumPy, on one thread, they must be met bit for bit; on
any other machine sums are rounded otherwise, and the same losses must be met within 5 %.
"""

import json
from pathlib import Path

import pytest
import training_curves

FILE = Path(__file__).resolve().parents[1] / "data" / "training_curves.json"


@pytest.fixture(scope="module")
def recorded():
    return json.loads(FILE.read_text("utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("curves")


@pytest.mark.parametrize("case", training_curves.CASES)
def test_a_published_run_learns_as_it_did(recorded, folder, case):
    found, expected = training_curves.curve(case, folder), recorded["curves"][case]
    if recorded["machine"] == training_curves.machine():
        assert found == expected
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.05)
