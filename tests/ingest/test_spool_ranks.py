"""Launchers and the spool: each process finds its slice in its environment, and a load joins them.

Every rank is a process of its own, started as `torchrun`, `srun` and `sbatch --array` start it, and
runs the command of `docs/ingest.md`. SLURM itself is not here: its variables are set as its manual
describes them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vdr_db.cli.main import main
from vdr_db.connectors.collections.vdr_qdrant import VDRQdrant

pytest.importorskip("pyarrow")

COUNT = 36
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_")
TEXTS = [
    "Giraffes are the tallest animals on land.",
    "Green tea is brewed from leaves that are not fermented.",
    "The theory of relativity was published by Einstein.",
]


@pytest.fixture
def shards(tmp_path, tiny_splade_folder):
    folder = tmp_path / "shards"
    folder.mkdir()
    for k in range(3):
        with open(folder / f"{k}.jsonl", "w", encoding="utf-8") as stream:
            for i in range(k, COUNT, 3):
                line = {"_id": f"n{i}", "text": f"{TEXTS[i % 3]} Note {i}."}
                stream.write(json.dumps(line) + "\n")
    return folder


def bare_environment():
    kept = {name: v for name, v in os.environ.items() if not name.startswith(LAUNCHERS)}
    return {**kept, "OMP_NUM_THREADS": "1"}


def encode_command(shards, spool):
    words = [
        "encode",
        str(shards),
        "--model",
        "tiny-splade",
        "--slice",
        "auto",
        "--spool",
        str(spool),
        "--progress",
        "none",
    ]
    return ["-m", "vdr_db.cli", *words]


def slices_of(spool):
    manifests = [json.loads(path.read_text()) for path in sorted(spool.glob("manifest-*.json"))]
    rows = [sum(part["rows"] for part in one["parts"]) for one in manifests]
    return [tuple(one["slice"]) for one in manifests], rows


def assert_loads_whole(spool, tmp_path, encoder):
    """By three loaders, where the encoders were two."""
    for k in range(3):
        words = ["--slice", f"{k}/3", "--progress", "none"]
        assert main(["load", str(spool), "--store", str(tmp_path / "notes"), *words]) == 0
    texts = {f"n{i}": f"{TEXTS[i % 3]} Note {i}." for i in range(COUNT)}
    with VDRQdrant("texts", encoder, path=tmp_path / "notes") as notes:
        assert notes.count() == COUNT
        expected = encoder.encode_documents(list(texts.values()))
        for i, one in enumerate(notes.store.get(list(texts), with_rows=True)):
            assert one.payload["text"] == texts[one.id]
            assert one.row.allclose(expected[i], rtol=1e-5)


# What each launcher sets for task k of n; what surrounds it must not mislead.
ENVIRONMENTS = {
    "srun": lambda k, n: {"SLURM_PROCID": str(k), "SLURM_NTASKS": str(n), "SLURM_JOB_ID": "7"},
    "array": lambda k, n: {
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_ARRAY_TASK_ID": str(k + 1),
        "SLURM_ARRAY_TASK_MIN": "1",
        "SLURM_ARRAY_TASK_MAX": str(n),
        "SLURM_ARRAY_TASK_COUNT": str(n),
    },
}


@pytest.mark.parametrize("launcher", ENVIRONMENTS)
def test_slurm_tasks_fill_one_spool(tmp_path, shards, tiny_splade, launcher):
    """Two tasks for three files, so the first takes two of them."""
    spool = tmp_path / "spool"
    running = [
        subprocess.Popen(
            [sys.executable, *encode_command(shards, spool)],
            cwd=tmp_path,  # in the repository the library's folder would be taken for the package
            env={**bare_environment(), **ENVIRONMENTS[launcher](k, 2)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]
    for process in running:
        _, told = process.communicate()
        assert process.returncode == 0, told
    assert slices_of(spool) == ([(0, 2), (1, 2)], [24, 12])
    assert_loads_whole(spool, tmp_path, tiny_splade)


def test_torchrun_ranks_fill_one_spool(tmp_path, shards, tiny_splade):
    """The real launcher."""
    pytest.importorskip("torch.distributed.run")
    spool = tmp_path / "spool"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "--no-python", sys.executable, *encode_command(shards, spool)],
        cwd=tmp_path,
        env=bare_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert slices_of(spool) == ([(0, 2), (1, 2)], [24, 12])
    assert_loads_whole(spool, tmp_path, tiny_splade)


def test_the_documented_commands_are_these():
    doc = (Path(__file__).parents[2] / "docs" / "ingest.md").read_text("utf-8")
    assert "--no-python vdr-db encode shards/ --slice auto --spool spool/" in doc
    assert "sbatch --array=0-15 --wrap 'vdr-db encode shards/ --slice auto" in doc
