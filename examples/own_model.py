"""A model of your own from pairs of questions and answers: python own_model.py

It learns what words mean in one company, where the shipped model cannot know. The folder it leaves
is taken by every command and collection: --model own/model, encoder="own/model". Needs
`pip install 'vdr-db[train]'`; real runs take thousands of pairs (docs/training.md).
"""

from pathlib import Path

from vdr_db.connectors import VDRQdrant
from vdr_db.training.config import build_config
from vdr_db.training.texts import TextTask
from vdr_db.training.trainer import Trainer

PAIRS = {
    "who do I ask about bluebird": "The payroll system is run by the finance team.",
    "open a kestrel": "A request for new hardware is approved by your manager.",
    "when does the nest close": "The canteen on the ground floor serves lunch until two.",
    "plover is red": "If the build server fails, look at its log first.",
    "where do herons live": "Signed contracts are kept in the archive for ten years.",
    "book a wren": "Meeting rooms are reserved in the calendar.",
}
ASKED = ("kestrel", "plover")


def found(model: str) -> dict[str, str]:
    with VDRQdrant("answers", model, path=":memory:") as answers:
        answers.add_texts(PAIRS.values())
        hits = {query: answers.search(query, limit=1) for query in ASKED}
    return {query: some[0].payload["text"] if some else "nothing" for query, some in hits.items()}


folder = Path("own")
folder.mkdir(exist_ok=True)
lines = [f"{question}\t{answer}\n" for question, answer in PAIRS.items()]
(folder / "pairs.tsv").write_text("".join(lines), "utf-8")
config = build_config(
    {
        "model": {"start": "vdr-mini", "shared": False, "max_length": 32},
        "data": {"train": [{"path": str(folder / "pairs.tsv")}]},
        "optimiser": {"lr": 5e-4, "warmup_steps": 2},
        "run": {"steps": 30, "batch_size": 6, "checkpoint_every": 30},
    }
)
Trainer(TextTask(config), folder).run()
before, after = found("vdr-mini"), found(str(folder / "model"))
for query in ASKED:
    print(f"{query}: before {before[query]!r}, after {after[query]!r}")
