"""Cold starts of two checkouts, side by side: `import vdr_db` and one `vdr-db search`.

    python benchmarks/bench_cold_start.py OLD NEW --out benchmarks/results/cold_start.csv

OLD and NEW are folders of checkouts, in both of which the same interpreter and packages run. Each
sample is a fresh process, the two checkouts one after the other and first in turn; what counts is
the processor time of the process and its children, user and system, which other programs of the
machine disturb less than time on the wall. Bytecode is compiled and files are read once before
that. The store of `search` is written by the checkout that searches it.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from measure import Row, rows_of, write_csv

TEXTS = (
    "The doctor gave him pills against the pain.",
    "She plays the violin in an orchestra.",
    "The jury found the defendant guilty.",
)
SEARCH = ("search", "medicine for a headache", "--store", "notes.qdrant", "--limit", "3")


def package_path(checkout: Path, folder: Path) -> Path:
    """A folder for PYTHONPATH with the package as it would be installed: one name, by links."""
    package = folder / "vdr_db"
    package.mkdir(parents=True)
    parts = {path.name: path for path in (checkout / "vdr_db").iterdir()}
    parts |= {name: checkout / name for name in ("kernels", "connectors")}
    for name, path in parts.items():
        (package / name).symlink_to(path.resolve())
    return folder


def processor_ms(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> float:
    """Processor time of a process and its children in milliseconds.

    Raises:
        SystemExit: The process failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def commit_of(checkout: Path) -> str:
    """Short commit of a checkout, with a plus sign where it has changes."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "none"


def measured(checkouts: Mapping[str, Path], rounds: int, scratch: Path) -> list[Row]:
    """Samples of both cold starts, for each checkout."""
    environments, folders = {}, {}
    for name, checkout in checkouts.items():
        path = package_path(checkout, scratch / name / "path")
        environments[name] = {
            **os.environ,
            "PYTHONPATH": str(path),
            "PYTHONPYCACHEPREFIX": str(scratch / name / "bytecode"),
            "PYTHONDONTWRITEBYTECODE": "",
            "OMP_NUM_THREADS": "1",
        }
        folder = folders[name] = scratch / name / "work"
        folder.mkdir()
        (folder / "notes.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    cli = [sys.executable, "-m", "vdr_db.cli"]
    arms = {"import": [sys.executable, "-c", "import vdr_db"], "search": [*cli, *SEARCH]}
    for name in checkouts:
        index = [*cli, "index", "notes.txt", "--store", "notes.qdrant"]
        for command in (index, *arms.values()):
            processor_ms(command, environments[name], folders[name])
    commits = {name: commit_of(checkout) for name, checkout in checkouts.items()}
    rows = []
    for op, command in arms.items():
        samples: dict[str, list[float]] = {name: [] for name in checkouts}
        for turn in range(rounds):
            for name in list(checkouts)[:: 1 if turn % 2 else -1]:
                samples[name].append(processor_ms(command, environments[name], folders[name]))
        shape = "import vdr_db" if op == "import" else " ".join(("vdr-db", *SEARCH))
        for name, commit in commits.items():
            found = rows_of(f"cold_{op}", name, shape, "-", {"processor (ms)": samples[name]})
            rows += [replace(row, commit=commit) for row in found]
        ratios = [new / old for old, new in zip(*samples.values(), strict=True)]
        found = rows_of(f"cold_{op}", "new / old", shape, "-", {"ratio of each round (1)": ratios})
        rows += [replace(row, commit="..".join(commits.values())) for row in found]
    for row in rows:
        print(f"{row.op:11} {row.backend:9} {row.median:7} {row.unit:2} [{row.p20}, {row.p80}]")
    return rows


def main() -> None:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="folder of the earlier checkout")
    parser.add_argument("new", type=Path, help="folder of the later one")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="CSV")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkouts = {"old": options.old.resolve(), "new": options.new.resolve()}
        rows = measured(checkouts, options.rounds, Path(scratch))
    if options.out is not None:
        write_csv(options.out, rows)


if __name__ == "__main__":
    main()
