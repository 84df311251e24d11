"""What the bag-of-tokens loss does: the same training with and without it, side by side.

    python scripts/make_training_pairs.py --cache CACHE --out PAIRS
    python benchmarks/bench_disentanglement.py PAIRS --threads 1 \
        --out benchmarks/results/disentanglement.csv

Each run starts from a fresh VDR head on the body of `tiny-splade` and minimises the published loss,
½ [ nll(gate(V(q)), V(d)) + nll(BoW(q), V(d)) ], or its first term alone. All else is equal: pairs,
order, steps, seed. Measured on the held-out pairs, before and after, documents at k weights:

- `top-100 share`: weight on the 100 most used dimensions, over all weight. Near 1, few dimensions
  do all the work and no longer stand for their tokens.
- `own-token share`: weight on tokens that the text itself holds.
- `unseen share`: weight on tokens that no text of the held-out part holds.
- non-zeros of documents and queries, nDCG@10.

A row is the median over seeds. The plot beside the CSV shows the share of any number of dimensions,
for the first seed.

Source: Zhou et al. 2024, Retrieval-based Disentangled Representation Learning, appendix D.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from measure import Row, rows_of, write_csv

from vdr_db.encoders.text import SparseEncoder
from vdr_db.evaluation.metrics import mean, mean_nonzeros, ndcg
from vdr_db.training.config import build_config
from vdr_db.training.models import load_student
from vdr_db.training.settings import EvaluationConfig, TrainConfig
from vdr_db.training.texts import TextTask
from vdr_db.training.trainer import Trainer
from vdr_db.training.watch import HeldOut

ARMS = {"with bag loss": 1.0, "without bag loss": 0.0}
"""Name -> weight of the bag-of-tokens term."""
START = "before training"
K, QUERY_K = 256, 128
LENGTH, QUERY_LENGTH = 64, 32
QUERIES, DOCUMENTS = 300, 600
Samples = dict[str, list[float]]


def settings(
    pairs: Path, start: str, *, bag_weight: float, steps: int, batch: int, seed: int
) -> TrainConfig:
    """One run's settings."""
    files = sorted(pairs.glob("*.tsv"))
    if not files:
        raise SystemExit(f"{pairs} must hold pairs as .tsv files, got none.")
    return build_config(
        {
            "model": {
                "start": start,
                "head": "vdr",
                "k": K,
                "query_k": QUERY_K,
                "max_length": LENGTH,
                "query_max_length": QUERY_LENGTH,
                "encode_max_length": LENGTH,
            },
            "data": {"train": [{"path": str(file)} for file in files], "bucket": 8},
            "loss": {
                "objective": "vdr",
                "temperature": 20.0,
                "bag_temperature": 4.0,
                "bag_weight": bag_weight,
            },
            "optimiser": {"lr": 5e-4, "warmup_steps": max(1, steps // 15)},
            "run": {"steps": steps, "batch_size": batch, "seed": seed},
        }
    )


def look(
    encoder: SparseEncoder, held_out: HeldOut
) -> tuple[dict[str, float], npt.NDArray[np.float64]]:
    """Measurements of a model by "metric (unit)", and the mass of each token id, `[V]`."""
    queries = encoder.encode_queries(held_out.queries)
    documents = encoder.encode_documents(held_out.documents)
    own = encoder.bag_of_tokens(held_out.documents)
    asked = encoder.bag_of_tokens(held_out.queries)
    mass = np.bincount(documents.indices, documents.values, minlength=documents.width)
    of_own = sum(float(documents[[i]].dot(own[[i]])[0, 0]) for i in range(len(documents)))
    scores = queries.dot(documents)
    run = {
        query: list(zip(held_out.document_ids, row.tolist(), strict=True))
        for query, row in zip(held_out.query_ids, scores, strict=True)
    }
    return {
        "top-100 share (of weight)": np.sort(mass)[::-1][:100].sum() / mass.sum(),
        "own-token share (of weight)": of_own / mass.sum(),
        "unseen share (of weight)": 1
        - mass[np.union1d(own.indices, asked.indices)].sum() / mass.sum(),
        "document non-zeros (weights/text)": mean_nonzeros(documents),
        "query non-zeros (weights/text)": mean_nonzeros(queries),
        "nDCG@10 ()": mean(ndcg(run, held_out.judgements, cutoff=10)),
    }, mass


def plot_mass(masses: Mapping[str, npt.NDArray[np.float64]], path: Path) -> None:
    """Draws which share of all weight the most used columns hold, one curve a model.

    Args:
        masses: Name -> `[V]`, weight of each column summed over documents.
        path: Of the file; its ending says the kind.
    """
    figure = Figure(figsize=(7.0, 5.5), dpi=120, layout="constrained")
    axis = figure.subplots()
    for name, mass in masses.items():
        share = np.sort(mass)[::-1].cumsum() / max(mass.sum(), 1e-12)
        axis.plot(np.arange(1, share.size + 1), share, label=name)
    axis.axvline(100, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.set_xlabel("most used columns")
    axis.set_ylabel("share of all weight")
    axis.legend()
    figure.savefig(path)


def main() -> None:
    """Trains, prints, and writes where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "pairs", type=Path, help="folder of scripts/make_training_pairs.py: *.tsv and heldout/"
    )
    parser.add_argument("--start", default="tiny-splade", help="folder, hub id or asset")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--out", type=Path, help="CSV file to write, and a .png beside it")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message=".*were cut")  # to the length of training, as meant
    held_out = HeldOut(
        EvaluationConfig(str(arguments.pairs / "heldout"), queries=QUERIES, documents=DOCUMENTS)
    )
    samples: dict[str, Samples] = {name: defaultdict(list) for name in (START, *ARMS)}
    masses: dict[str, npt.NDArray[np.float64]] = {}
    for seed in arguments.seeds:
        for name, bag_weight in ARMS.items():
            config = settings(
                arguments.pairs,
                arguments.start,
                bag_weight=bag_weight,
                steps=arguments.steps,
                batch=arguments.batch,
                seed=seed,
            )
            with tempfile.TemporaryDirectory() as folder:
                task = TextTask(config)
                outcome = Trainer(task, Path(folder), device=torch.device("cpu")).run()
            found, mass = look(task.encoder, held_out)
            masses.setdefault(name, mass)
            for metric, value in found.items():
                samples[name][metric].append(value)
            print(f"seed {seed}, {name}: {outcome.seconds:.0f} s", flush=True)
    found, masses[START] = look(load_student(config.model, torch.device("cpu")), held_out)
    samples[START] = {metric: [value] for metric, value in found.items()}
    count = f"N={len(held_out.documents)} Q={len(held_out.queries)}"
    shape = f"{arguments.start} steps={arguments.steps} B={arguments.batch} k={K} {count}"
    rows: list[Row] = []
    for name in samples:
        rows += rows_of("disentanglement", name, shape, "float32", samples[name])
    for row in rows:
        print(f"{row.backend:17} {row.metric:19} {row.median:>9} {row.unit}")
    if arguments.out:
        write_csv(arguments.out, rows)
        plot_mass({name: masses[name] for name in samples}, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
