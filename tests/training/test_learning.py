"""A short training on real texts, as a user runs it: the loss falls, held-out quality rises."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import yaml

import vdr_db
from vdr_db import SparseEncoder
from vdr_db.cli.main import main
from vdr_db.training.watch import read_log

SAMPLE = Path(vdr_db.__file__).parent / "data" / "debian_sample.tar.gz"
HELD_OUT, STEPS, BATCH = 100, 30, 16


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    """Short and long descriptions: pairs to train on, and a held-out BEIR folder."""
    folder = tmp_path_factory.mktemp("debian")
    with tarfile.open(fileobj=io.BytesIO(SAMPLE.read_bytes())) as archive:
        lines = archive.extractfile("corpus.jsonl").read().decode("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    held, rest = rows[::10][:HELD_OUT], [row for i, row in enumerate(rows) if i % 10]
    pairs = (f"{row['title']}\t{' '.join(row['text'].split())}\n" for row in rest)
    (folder / "pairs.tsv").write_text("".join(pairs), "utf-8")
    beir = folder / "heldout"
    (beir / "qrels").mkdir(parents=True)
    for name, field in (("queries", "title"), ("corpus", "text")):
        records = (json.dumps({"_id": row["_id"], "text": row[field]}) + "\n" for row in held)
        (beir / f"{name}.jsonl").write_text("".join(records), "utf-8")
    (beir / "qrels" / "test.tsv").write_text(
        "".join(f"{row['_id']}\t{row['_id']}\t1\n" for row in held), "utf-8"
    )
    return folder


def test_a_new_vdr_head_learns(debian, tiny_splade_folder, tmp_path, capsys):
    """From a head without training to a useful one in under a minute."""
    settings = {
        "model": {
            "start": str(tiny_splade_folder),
            "head": "vdr",
            "k": 128,
            "query_k": 64,
            "max_length": 64,
            "query_max_length": 24,
        },
        "data": {"train": [{"path": "pairs.tsv"}], "bucket": 4},
        "loss": {
            "objective": "vdr",
            "temperature": 20.0,
            "bag_temperature": 4.0,
            "gate_documents": True,
        },
        "optimiser": {"lr": 5e-4, "warmup_steps": 4},
        "run": {"steps": STEPS, "batch_size": BATCH, "log_every": 1, "threads": 0},
        "evaluation": {"folder": "heldout"},
    }
    (debian / "run.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    out = tmp_path / "out"
    command = ["train", str(debian / "run.yaml"), "--out", str(out), "--json", "--device", "cpu"]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    losses = [row["loss"] for row in read_log(out / "log.jsonl") if "loss" in row]
    assert len(losses) == STEPS
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert said["last"]["ndcg@10"] > said["first"]["ndcg@10"] + 0.05
    assert said["best_ndcg@10"] == max(said["last"]["ndcg@10"], 0)

    encoder = SparseEncoder.from_pretrained(out / "model")
    assert encoder.document_tower.head.name == "vdr"
    assert (encoder.activation, encoder.document_entry.k) == ("elu1p", 128)
    card = (out / "model" / "README.md").read_text("utf-8")
    assert "pairs.tsv" in card
    assert str(debian) not in card, "a card names no folder of one machine"
    assert (out / "run.png").read_bytes()[:4] == b"\x89PNG"
    # Asked for once more, the run is there already.
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == STEPS


def test_wrong_use_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: {stat: x}")
    assert main(["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path)]) == 2
    assert "unknown key `model.stat`" in capsys.readouterr().err
    arguments = ["train", "vdr-msmarco", "--out", str(tmp_path), "--set", "steps"]
    assert main(arguments) == 2
    assert "KEY=VALUE" in capsys.readouterr().err


def test_mining_from_the_command_line(debian, tmp_path, capsys):
    pytest.importorskip("bm25s")
    out = tmp_path / "mined.jsonl"
    command = ["mine", str(debian / "pairs.tsv"), "--out", str(out), "--negatives", "3"]
    assert main([*command, "--scores", "--arrange", "4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert said == {"examples": len(rows), "skipped": 0, "file": str(out)}
    assert len(rows) > 1000
    assert all(len(row["scores"]) == 1 + len(row["negatives"]) for row in rows)
