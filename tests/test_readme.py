"""The README is true: examples print what it says, figures are those of the result files."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vdr_db.cli.main import COMMANDS, main
from vdr_db.cli.pictograms import write_pictograms

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all blocks, in which they work from top to bottom."""
    folder = tmp_path_factory.mktemp("readme")
    write_pictograms(folder / "pictograms")
    return folder


def test_the_python_examples_print_what_it_says(folder):
    examples, printed = blocks("python"), blocks("text")
    assert len(examples) == len(printed) == 2
    for code, expected in zip(examples, printed, strict=True):
        lines = [line for line in code.splitlines() if line and "import" not in line]
        assert len(lines) <= 10
        # Not in the repository's root, where the library's folder would be taken for a package.
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == expected


def test_the_commands_print_what_it_says(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")
    (console,) = blocks("console")
    for example in re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]:
        command, _, expected = example.partition("\n")
        program, *arguments = shlex.split(command)
        if program == "cat":
            Path(arguments[0]).write_text(expected, encoding="utf-8")
            continue
        assert program == "vdr-db"
        assert main(arguments) == 0
        printed = capsys.readouterr().out.replace("\u00a0", " ")
        assert [line.rstrip() for line in printed.splitlines()] == [
            line.replace("\u00a0", " ") for line in expected.splitlines()
        ], command


def test_every_command_is_listed():
    assert re.findall(r"^\| `vdr-db (\w+)` \|", README, re.MULTILINE) == list(COMMANDS)


def test_the_make_targets_exist():
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_speed_table_is_that_of_the_result_file():
    measured: dict[str, dict[tuple[str, str], float]] = {}
    with (ROOT / "benchmarks" / "results" / "encoding_cpu.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values = measured.setdefault(row["shape"].split()[0], {})
            values[row["backend"], row["metric"]] = float(row["median"])
    ours, peer = "vdr_db", "sentence-transformers"
    for model, numbers in measured.items():
        (line,) = (line for line in README.splitlines() if line.startswith(f"| {model} |"))
        shown = [float(n) for n in re.findall(r"[\d.]+", line.replace(",", "").split("|", 2)[2])]
        expected = [
            numbers[ours, "texts_per_second"],
            numbers[peer, "texts_per_second"],
            numbers[ours, "speedup"],
            numbers[ours, "peak_resident"],
            numbers[peer, "peak_resident"],
        ]
        assert shown == pytest.approx(expected, rel=0.02)


def test_the_install_table_is_that_of_the_result_file():
    measured: dict[str, dict[str, float]] = {}
    with (ROOT / "benchmarks" / "results" / "install.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            measured.setdefault(row["shape"], {})[row["metric"]] = float(row["median"])
    shown = re.findall(r"^\| (\S+) \| .* \| ([\d,]+) MB \| (\d+) s \|$", README, re.MULTILINE)
    assert [(name.strip("`()"), size, took) for name, size, took in shown] == [
        (name, f"{values['size']:,.0f}", f"{values['processor time']:.0f}")
        for name, values in measured.items()
    ]


def test_the_quality_table_is_that_of_the_result_file():
    metrics = ("ndcg_10", "recall_100", "mrr_10")
    measured: dict[str, dict[tuple[str, str], float]] = {}
    with (ROOT / "benchmarks" / "results" / "quality.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            collection = row["shape"].split()[0]
            sizes = tuple(part.split("=")[1] for part in row["shape"].split()[1:3])
            values = measured.setdefault((collection, *sizes), {})
            values[row["backend"], row["metric"]] = float(row["median"])
    expected = [
        f"| {name} | {int(documents):,} | {int(queries):,} | "
        + " | ".join(
            " / ".join(f"{values[ranker, metric]:.3f}" for ranker in ("vdr-mini", "BM25"))
            for metric in metrics
        )
        + " |"
        for (name, documents, queries), values in measured.items()
    ]
    shown = [line for line in README.splitlines() if re.match(r"\| \w+ \| [\d,]+ \|", line)]
    assert shown == expected, "\n" + "\n".join(expected)
