"""Bombs: small files that say they are large are refused by name, fast and without the memory."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import threading

import pytest

from vdr_db.budget import Budget
from vdr_db.errors import ConfigError, InputError
from vdr_db.lines import lines_of
from vdr_db.tables import table_rows

GIGABYTES = 3_500_000_000


def refusal(script, *arguments):
    """What a fresh process says, its seconds of processor time, and its growth in MB."""
    start = """
    import json, resource, sys, time
    from vdr_db.errors import VdrError
    def measured(work):
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            work()
            told = "no error"
        except VdrError as error:
            told = str(error)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps([told, time.process_time() - began, grown / 1024]))
    """
    code = textwrap.dedent(start) + textwrap.dedent(script)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    # From elsewhere, because the current folder would be searched for modules first.
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tempfile.gettempdir(),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def packed_line(tmp_path_factory):
    """A line of 3.5 GB in 3.5 MB: many gzip members of the same zeros."""
    file = tmp_path_factory.mktemp("bombs") / "line.jsonl.gz"
    member = gzip.compress(b" " * 50_000_000, 9)
    with file.open("wb") as stream:
        for _ in range(GIGABYTES // 50_000_000):
            stream.write(member)
    assert file.stat().st_size < 4_000_000
    return file


def test_a_line_of_gigabytes(packed_line):
    told, seconds, megabytes = refusal(
        """
        from vdr_db.readers import read_records
        measured(lambda: list(read_records(sys.argv[1])))
        """,
        packed_line,
    )
    assert "line.jsonl.gz:1: the line has more than 16,777,216 characters" in told
    assert (seconds < 2, megabytes < 200) == (True, True), (seconds, megabytes)


def test_lines_up_to_the_budget_are_read(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("a" * 9 + "\n" + "b" * 10 + "\n" + "é" * 9)
    budget = Budget(line_characters=10)
    with pytest.raises(InputError, match=r"lines\.txt:2: the line has more than 10 characters"):
        list(lines_of(file, budget=budget))
    assert len(list(lines_of(file, budget=Budget(line_characters=11)))) == 3


# Imports of what reads a folder are not part of a refusal; torch is not among them: the bombs are
# found before it is imported.
LOADED = """
from vdr_db import SparseEncoder
measured(lambda: SparseEncoder.from_pretrained(sys.argv[1], device="cpu"))
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("kind", ["bert", "distilbert", "hub"])
def test_a_thousand_million_layers(tmp_path, kind):
    pytest.importorskip("transformers")
    from model_folders import change_json, write_bert

    folder = write_bert(tmp_path / "m")
    changes = {"num_hidden_layers": 10**9}
    if kind == "hub":  # a family that transformers computes
        changes["model_type"] = "electra"
    if kind == "distilbert":
        changes = {"n_layers": 10**9, "model_type": "distilbert"}
        changes |= {"dim": 32, "n_heads": 4, "hidden_dim": 64, "activation": "gelu"}
    change_json(folder / "config.json", **changes)
    told, seconds, megabytes = refusal(LOADED, folder)
    assert "says 1,000,000,000 layers, and its files hold" in told
    assert (seconds < 2, megabytes < 200) == (True, True), (seconds, megabytes)


def test_a_thousand_million_layers_of_images(tmp_path):
    pytest.importorskip("torch")
    from image_folders import write_cross_modal

    from vdr_db import ImageEncoder

    folder = tmp_path / "m"
    published = write_cross_modal(tmp_path / "published")
    ImageEncoder.from_pretrained(published, device="cpu").save_pretrained(folder)
    settings = folder / "vdr_db_image.json"
    told = json.loads(settings.read_text())
    told["body"]["settings"]["layers"] = 10**9
    settings.write_text(json.dumps(told))
    told, seconds, megabytes = refusal(LOADED.replace("SparseEncoder", "ImageEncoder"), folder)
    assert "says 1,000,000,000 layers, and its files hold" in told
    assert (seconds < 2, megabytes < 200) == (True, True), (seconds, megabytes)


def test_a_token_id_of_a_thousand_million(tmp_path):
    pytest.importorskip("torch")
    from model_folders import write_bert

    folder = write_bert(tmp_path / "m")
    told = json.loads((folder / "tokenizer.json").read_text())
    told["model"]["vocab"]["sun"] = 10**9
    (folder / "tokenizer.json").write_text(json.dumps(told))
    said, seconds, megabytes = refusal(LOADED, folder)
    assert "token ids must lie below 4,194,304, got 1,000,000,000" in said
    assert (seconds < 2, megabytes < 200) == (True, True), (seconds, megabytes)


def test_a_row_of_gigabytes_in_short_lines(tmp_path):
    file = tmp_path / "rows.csv.gz"
    member = gzip.compress(b"0123456789abcdef\n" * 3_000_000, 9)
    with file.open("wb") as stream:
        stream.write(gzip.compress(b'id,text\n1,"'))
        for _ in range(GIGABYTES // 51_000_000):
            stream.write(member)
    told, seconds, megabytes = refusal(
        """
        from vdr_db.readers import read_records
        measured(lambda: list(read_records(sys.argv[1])))
        """,
        file,
    )
    assert "a row has more than 16,777,216 characters" in told
    assert (seconds < 2, megabytes < 200) == (True, True), (seconds, megabytes)


def test_rows_up_to_the_budget_are_read(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('id,text\n1,"a\nb"\n2,"c\nd"\n3,"e\nfghijk"\n')
    rows = table_rows(file, "csv", kinds={}, texts={"text"}, budget=Budget(record_characters=13))
    assert [row["text"] for row, _ in rows] == ["a\nb", "c\nd", "e\nfghijk"]
    rows = table_rows(file, "csv", kinds={}, texts={"text"}, budget=Budget(record_characters=12))
    with pytest.raises(InputError, match=r"rows\.csv:7: a row has more than 12 characters"):
        list(rows)


def test_a_row_of_gigabytes_in_a_parquet_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    file = tmp_path / "rows.parquet"
    zeros = pyarrow.Table.from_pydict({"text": ["0" * 300_000_000]})
    parquet.write_table(zeros, file, compression="zstd", use_dictionary=False)
    del zeros
    assert file.stat().st_size < 1_000_000
    told, seconds, megabytes = refusal(
        """
        import pyarrow.parquet
        from vdr_db.ingest.parquet import read_parquet
        measured(lambda: list(read_parquet(sys.argv[1])))
        """,
        file,
    )
    assert "row group 0 unpacks to 300,000" in told
    assert (seconds < 2, megabytes < 200) == (True, True), (seconds, megabytes)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, None, "9", float("nan")])
def test_a_budget_is_of_positive_numbers(wrong):
    for name in ("line_characters", "image_pixels", "first_byte_s"):
        if name == "first_byte_s" and wrong == 1.5:
            continue
        with pytest.raises(ConfigError, match=f"the budget `{name}` must be"):
            Budget(**{name: wrong})


@pytest.mark.parametrize("command", ["index", "ingest"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_with_a_name_is_read_as_a_stream(tmp_path, capsys, command):
    from vdr_db.cli.main import main

    pipe = tmp_path / "texts"
    os.mkfifo(pipe)

    def write():
        pipe.write_text("tea leaves\na giraffe\n")

    writer = threading.Thread(target=write)
    writer.start()
    store = str(tmp_path / "c")
    assert main([command, str(pipe), "--format", "text", "--store", store]) == 0
    writer.join()
    assert main(["search", "tea", "--store", store, "--json"]) == 0
    assert '"tea leaves"' in capsys.readouterr().out


def test_a_fault_of_ours_exits_with_70_and_asks_for_a_report(monkeypatch, capsys):
    from vdr_db.cli import info, main

    def fault(arguments):
        raise ZeroDivisionError("nobody saw that coming")

    monkeypatch.setattr(info, "run_command", fault)
    assert main.main(["info"]) == 70
    said = capsys.readouterr().err
    assert "nobody saw that coming" in said
    assert "please report it" in said
    with pytest.raises(ZeroDivisionError):
        main.main(["info", "--debug"])
