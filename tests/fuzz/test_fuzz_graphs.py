"""Mutants of an ONNX graph: refused by their digest, and without one read or refused by name.

`VDR_DB_FUZZ_FILES` multiplies their number.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

MUTANTS = 100 * int(os.environ.get("VDR_DB_FUZZ_FILES", "1"))
SEED = 20

# Each mutant has a process of its own, since some may take theirs down; forked from one that has
# imported everything and opened nothing.
TRIED = """
import json, os, random, sys, traceback, warnings
from collections import Counter
from pathlib import Path
import onnxruntime, tokenizers
import vdr_db.encoders.text
from vdr_db import SparseEncoder
from vdr_db.errors import VdrError

folder, mutants, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
warnings.simplefilter("ignore")
(graph,) = folder.glob("*.onnx")
whole, draw, seen = graph.read_bytes(), random.Random(seed), Counter()
for number in range(-1, mutants):
    made = bytearray(whole)
    for _ in range(draw.randint(1, 2) if number >= 0 else 0):
        at, kind = draw.randrange(len(made)), draw.randrange(8)
        if kind == 0:
            del made[at : at + draw.randint(1, 9)]
        elif kind == 1:
            made[at:at] = made[at : at + draw.randint(1, 9)]
        elif kind == 2 and draw.random() < 0.3:
            del made[max(at, 1) :]
        else:
            made[at] ^= 1 << draw.randrange(8)
    graph.write_bytes(made)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # onnxruntime prints what it tries
        code = 0
        try:
            encoder = SparseEncoder.from_pretrained(folder, device="cpu", runtime="onnx")
            encoder.encode_documents(["the cat", ""])
        except VdrError:
            code = 1
        except BaseException:
            traceback.print_exc()
            code = 2
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    ended = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 3
    outcome = ("read", "refused", "foreign", "killed")[ended]
    if number >= 0:
        seen[outcome] += 1
    else:
        assert outcome == "read", "the graph itself"
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    from model_folders import write_bert

    from vdr_db.encoders.export import export

    folder = tmp_path_factory.mktemp("graphs")
    export(write_bert(folder / "source"), folder / "model")
    return folder / "model"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each mutant")
def test_mutants_without_digests_are_read_or_refused(exported):
    settings = exported / "vdr_db.json"
    told = json.loads(settings.read_text())
    assert [name for name in told.pop("digests") if name.endswith(".onnx")] == ["bert.onnx"]
    settings.write_text(json.dumps(told))
    command = [sys.executable, "-c", TRIED, str(exported), str(MUTANTS), str(SEED)]
    elsewhere = tempfile.gettempdir()  # the current folder would be searched for modules first
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=elsewhere, timeout=300
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    print("graphs:", seen)  # noqa: T201, counts for the log of CI
    assert "foreign" not in seen, done.stderr[-3000:]
    assert "killed" not in seen, done.stderr[-3000:]
    assert seen["read"] + seen["refused"] == MUTANTS
