"""`vdr-tiny` beside what else the same trainer makes of the same body and the same texts.

    python benchmarks/bench_baselines.py CACHE demo FOLDER... --out benchmarks/results/baselines.csv

`CACHE` is the folder `make train-tiny` works in; it holds the training texts. Each arm has the
model's settings (body, batches, their order, steps, learning rate, seed) but for its objective:

- `DPR`: inner product of the first token's hidden states, in-batch InfoNCE.
- `SPLADE`: log(1 + relu), in-batch InfoNCE of all columns, FLOPS on both sides.
- `VDR`: elu1p, ½ [ nll(gate(V(q)), V(d)) + nll(BoW(q), V(d)) ], no teachers.
- `BERT_raw`: no training: a fresh VDR head on the first weights.
- `first weights`: the SPLADE that all start from, as published.

A run that is there is used again. Rows are like those of `bench_quality.py`; a dense arm has no
weights and no MRR.

Source: Zhou et al. 2024, Retrieval-based Disentangled Representation Learning, table 1, for which
baselines; Karpukhin et al. 2020 (DPR); Formal et al. 2021 (SPLADE v2).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from bench_quality import collections, quality_rows
from measure import Row, rows_of, write_csv

from vdr_db.encoders.text import SparseEncoder
from vdr_db.evaluation.quality import TestCollection, evaluate_modes
from vdr_db.training.config import load_config
from vdr_db.training.models import MODEL_FOLDER, load_student, make_sides
from vdr_db.training.settings import EvaluationConfig, TrainConfig
from vdr_db.training.texts import TextTask
from vdr_db.training.trainer import Trainer
from vdr_db.training.watch import HeldOut

SETTINGS = Path(__file__).resolve().parents[1] / "scripts" / "train_tiny.yaml"
PLAIN = {
    "loss.imitation": "0.0",
    "loss.kl": "0.0",
    "loss.weight": "1.0",
}
ARMS: Mapping[str, Mapping[str, str]] = {
    "DPR": {**PLAIN, "loss.objective": "dpr", "loss.gate_documents": "false"},
    "SPLADE": {
        **PLAIN,
        "loss.objective": "infonce",
        "loss.gate_documents": "false",
        "loss.flops_query": "5e-3",
        "loss.flops_document": "3e-3",
        "loss.regulariser_warmup": "100",
        "model.activation": "log1p_relu",
    },
    "VDR": {**PLAIN, "loss.bag_weight": "1.0"},
}
"""Name -> what differs from the model's settings."""


def settings_of(arm: str, cache: Path) -> TrainConfig:
    """Settings of an arm, its texts in `cache`."""
    place = cache / f"{arm}.yaml"  # beside the texts, which its paths are relative to
    place.write_text(SETTINGS.read_text("utf-8"), "utf-8")
    return load_config(place, {**ARMS[arm], "run.checkpoint_every": "100"})


def train(arm: str, cache: Path) -> Path:
    """Folder of an arm's run, trained if it is not there yet."""
    output = cache / "baselines" / arm
    if (output / "done").exists():
        return output

    def report(step: int, total: int, numbers: dict[str, float]) -> None:
        if step % 50 == 0:
            sys.stderr.write(f"{arm}: step {step}/{total}, loss {numbers['loss']:.4f}\n")

    outcome = Trainer(TextTask(settings_of(arm, cache)), output).run(report)
    (output / "done").write_text(f"{outcome.steps} steps, {outcome.seconds:.0f} s\n", "utf-8")
    return output


def encoders(cache: Path, model: str) -> Iterator[SparseEncoder]:
    """Every sparse arm."""
    start = load_config(SETTINGS).model.start
    arms = {
        "vdr-tiny": SparseEncoder.from_pretrained(model),
        "first weights": SparseEncoder.from_pretrained(start, max_length=512),
        "BERT_raw": SparseEncoder.from_pretrained(
            start, head="vdr", k=256, query_k=128, max_length=512
        ),
        **{
            arm: SparseEncoder.from_pretrained(train(arm, cache) / MODEL_FOLDER)
            for arm in ARMS
            if arm != "DPR"
        },
    }
    for name, encoder in arms.items():
        encoder.model = name
        yield encoder


def dense_rows(cache: Path, collection: TestCollection, folder: Path) -> list[Row]:
    """What the dense arm reaches."""
    config = settings_of("DPR", cache)
    trained = train("DPR", cache) / MODEL_FOLDER
    encoder = load_student(config.model, torch.device("cpu"))
    saved = SparseEncoder.from_pretrained(trained).named_tensors()
    with torch.no_grad():
        for name, parameter in encoder.named_tensors().items():
            parameter.copy_(saved[name])
    reached = HeldOut(EvaluationConfig(folder=str(folder))).measure_dense(
        *make_sides(encoder, config.model)
    )
    shape = f"{collection.name} N={len(collection.documents)} Q={len(collection.queries)}"
    samples = {"ndcg_10": [reached["ndcg@10"]], "recall_100": [reached["recall@100"]]}
    return rows_of("evaluate", "DPR", shape, "float32", samples)


def main() -> None:
    """Trains what is missing, evaluates everything, writes the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cache", type=Path, metavar="CACHE")
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--model", default="vdr-tiny")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these (default: all)")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    cache = arguments.cache.resolve()
    arms = [
        encoder
        for encoder in encoders(cache, arguments.model)
        if arguments.arms is None or encoder.model in arguments.arms
    ]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for collection, folder in collections(arguments.folders, scratch):
            for encoder in arms:
                length = encoder.document_entry.max_length
                for quality in evaluate_modes(collection, encoder):
                    rows += quality_rows(collection, quality, length=length)
            if arguments.arms is None or "DPR" in arguments.arms:
                rows += dense_rows(cache, collection, folder)
            write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
