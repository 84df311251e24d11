"""The command line: what it prints, where, with which exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vdr_db.cli.main import COMMANDS, main
from vdr_db.sparse import SparseRows

NOTES = Path(__file__).parent / "data" / "notes.jsonl"

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command in this process; returns exit code, stdout lines and stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "notes.qdrant"
    assert main(["index", str(NOTES), "--store", str(folder)]) == 0
    return folder


def in_process(*arguments, cwd, **options):
    # Not from the root of the repository: `-m` would take the library's folder there for a package.
    command = [sys.executable, "-m", "vdr_db.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, **options
    )


def test_help_lists_every_command(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(f"    {name} " in out for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        assert "--json" in capsys.readouterr().out


def test_a_command_imports_no_other(tmp_path):
    code = (
        "import sys; from vdr_db.cli.main import COMMANDS, make_parser; make_parser('search'); "
        "print({c.module for c in COMMANDS.values() if f'vdr_db.cli.{c.module}' in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "{'search'}", done.stderr


@pytest.mark.parametrize("arguments", [[], ["fly"], ["search", "x"], ["encode", "--k", "many"]])
def test_wrong_use_is_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: vdr-db")


def test_encode_shows_the_heaviest_words(run):
    code, out, err = run("encode", "a cat is laying next to a blue book", "", "--top", "3")
    assert code == 0
    assert out == [
        "a cat is laying next to a blue book",
        "cat\u00a011.13   lay\u00a09.21   blue\u00a08.69   and\u00a0186\u00a0more",
        "(empty text)",
        "no weight at all",
    ]
    assert err == ""


def test_encode_to_json_lines(run, tmp_path):
    code, out, _ = run("encode", "--input", NOTES, "--json")
    rows = [json.loads(line) for line in out]
    assert code == 0
    assert [row["id"] for row in rows] == ["sky", "tea", "zoo"]
    weights = list(rows[2]["weights"].values())
    assert weights == sorted(weights, reverse=True)
    assert rows[2]["weights"]["height"] > 0
    target = tmp_path / "notes-vectors.jsonl"
    code, shown, err = run("encode", "--input", NOTES, "--out", target)
    assert (code, shown) == (0, [])
    assert target.read_text(encoding="utf-8").splitlines() == out
    assert "3 texts" in err


def test_encode_to_npz(run, tmp_path, vdr_mini):
    code, out, _ = run("encode", "tea", "", "--out", tmp_path / "rows.npz", "--queries")
    assert (code, out) == (0, [])
    assert SparseRows.load(tmp_path / "rows.npz") == vdr_mini.encode_queries(["tea", ""])
    (tmp_path / "none.jsonl").write_text("")
    run("encode", "--input", tmp_path / "none.jsonl", "--out", tmp_path / "rows.npz")
    assert SparseRows.load(tmp_path / "rows.npz").shape == (0, 30522)


def test_encode_keeps_k_weights(run):
    _, out, _ = run("encode", "a cat is laying next to a blue book", "--k", "2", "--json")
    assert list(json.loads(out[0])["weights"]) == ["cat", "lay"]


def test_encode_reads_as_much_as_it_is_told(run):
    long = "tea " * 50 + "giraffe"
    shown = run("encode", long, "--max-length", "20", "--json")
    assert shown[0] == 0
    assert "were cut" in shown[2]
    assert run("encode", "tea " * 18, "--max-length", "20", "--json")[1][0] == shown[1][0]


def test_search_shows_hits_with_the_words_that_matched(run, store):
    code, out, err = run("search", "a tall beast", "--store", store, "--limit", "1")
    assert code == 0
    assert err == ""
    assert out[0] == "a tall beast"
    hit = next(line for line in out if line.startswith("1 "))
    assert hit.split()[1:4] == ["422.85", "zoo", "Giraffe"]
    assert "tall" in hit
    assert "█" in hit
    assert out[-1] == "1 best of 3"
    assert all(len(line.rstrip()) <= 80 for line in out)


def test_search_as_json(run, store):
    code, out, _ = run("search", "a tall beast", "drink", "--store", store, "--json")
    found = [json.loads(line) for line in out]
    assert code == 0
    assert [row["query"] for row in found] == ["a tall beast", "drink"]
    assert [row["hits"][0]["id"] for row in found] == ["zoo", "tea"]
    best = found[0]["hits"][0]
    assert best["score"] == pytest.approx(sum(share for _, share in best["words"]), rel=1e-5)
    assert best["payload"]["title"] == "Giraffe"


def test_search_with_filter_and_mode(run, store):
    arguments = ("search", "hot water", "--store", store, "--json")
    _, out, _ = run(*arguments, "--filter", '{"title": "Giraffe"}')
    assert all(hit["id"] == "zoo" for hit in json.loads(out[0])["hits"])
    _, out, _ = run(*arguments, "--mode", "alpha")
    best = json.loads(out[0])["hits"][0]
    assert best["id"] == "tea"
    assert {word for word, _ in best["words"]} == {"hot", "water"}
    code, out, _ = run(*arguments, "--min-score", "1e9")
    assert (code, json.loads(out[0])["hits"]) == (1, [])
    code, _, err = run(*arguments, "--filter", "{title}")
    assert (code, "--filter must be JSON" in err) == (2, True)
    code, _, err = run(*arguments, "--mode", "beta")
    assert (code, "mode 'beta'" in err) == (2, True)


def test_nothing_found_is_1(run, store):
    code, out, _ = run("search", "", "--store", store)
    assert code == 1
    assert "nothing found" in out
    code, out, _ = run("search", "tea", "--store", store, "--filter", '{"title": "x"}', "--json")
    assert code == 1
    assert json.loads(out[0])["hits"] == []


def test_explain(run, store):
    code, out, _ = run("explain", "a tall beast", "zoo", "--store", store, "--json")
    explained = json.loads(out[0])
    assert code == 0
    assert explained["score"] == pytest.approx(422.847, abs=0.05)
    assert explained["score"] == pytest.approx(
        sum(term["query_weight"] * term["document_weight"] for term in explained["terms"])
    )
    code, out, _ = run("explain", "a tall beast", "zoo", "--store", store)
    assert out[1].split()[0] == "tall"
    assert [line.split()[:2] for line in out[-3:-1]] == [["score", "422.847"], ["own", "words"]]
    assert out[-4].split()[:3] == ["+", str(len(explained["terms"]) - 20), "more"]
    _, short, _ = run("explain", "a tall beast", "zoo", "--store", store, "--top", "2")
    assert [line.split()[0] for line in short[1:]] == [
        out[1].split()[0],
        out[2].split()[0],
        "+",
        "score",
        "own",
        "model",
    ]
    assert sum(float(line.split()[3]) for line in short[1:4]) == pytest.approx(422.847, abs=2e-3)
    _, whole, _ = run("explain", "a tall beast", "zoo", "--store", store, "--top", "0")
    assert len(whole) == len(explained["terms"]) + 4
    code, _, err = run("explain", "a tall beast", "cow", "--store", store)
    assert (code, err) == (2, "vdr-db: The collection holds no document with the id 'cow'.\n")


def test_ids_that_are_numbers(run, tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n12,tea\n")
    (tmp_path / "a.jsonl").write_text('{"id": 13, "text": "tea"}\n')
    place = ("--store", tmp_path / "s")
    assert run("index", tmp_path / "a.csv", tmp_path / "a.jsonl", *place)[0] == 0
    for id in (12, 13):
        code, out, _ = run("explain", "tea", id, *place, "--json")
        assert code == 0
        assert str(json.loads(out[0])["id"]) == str(id)


def test_index_can_be_repeated(run, tmp_path):
    place = ("--store", tmp_path / "s", "--json")
    assert json.loads(run("index", NOTES, *place)[1][0]) == {"written": 3, "refused": 0, "texts": 3}
    assert json.loads(run("index", NOTES, *place)[1][0]) == {"written": 3, "refused": 0, "texts": 3}


def test_index_of_chosen_fields_from_standard_input(run, tmp_path):
    lines = '{"key": "a", "body": "green tea", "year": 1}\n'
    process = in_process(
        *("index", "-", "--store", tmp_path / "s", "--id-field", "key", "--text-field", "body"),
        *("--payload-field", "year"),
        stdin=subprocess.PIPE,
        cwd=tmp_path,
    )
    _, err = process.communicate(lines, timeout=120)
    assert process.returncode == 0, err
    _, out, _ = run("search", "tea", "--store", tmp_path / "s", "--json")
    assert json.loads(out[0])["hits"][0]["payload"] == {"year": 1, "text": "green tea"}


def test_index_names_bad_rows_and_keeps_the_others(run, tmp_path):
    texts = [{"id": i, "text": "tea"} for i in range(30)]
    texts[3]["id"], texts[4]["id"], texts[5]["id"] = -1, 2**64, "x" * 600
    texts[6]["_vdr_id"] = 1
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(text) + "\n" for text in texts))
    place = ("--store", tmp_path / "s", "--json")
    code, out, err = run("index", file, *place)
    assert (code, json.loads(out[0])) == (3, {"written": 26, "refused": 4, "texts": 26})
    for line in (4, 5, 6, 7):
        assert f"vdr-db: {file}:{line}: " in err
    assert "must not start with '_vdr" in err
    kept = tmp_path / "refused.jsonl"
    assert run("index", file, *place, "--quarantine", kept)[0] == 3
    sources = [json.loads(line)["source"] for line in kept.read_text().splitlines()]
    assert sources == [f"{file}:{line}" for line in (4, 5, 6, 7)]
    file.write_text("".join(json.dumps({"id": -1, "text": "tea"}) + "\n" for _ in range(30)))
    code, _, err = run("index", file, "--store", tmp_path / "none")
    assert (code, err.count(f"vdr-db: {file}:")) == (2, 1), "an id that comes twice ends it"


def test_index_of_tokens_searches_in_mode_beta(run, tmp_path):
    assert run("index", NOTES, "--store", tmp_path / "s", "--tokens")[0] == 0
    _, out, _ = run("search", "a boiling drink", "--store", tmp_path / "s", "--json")
    best = json.loads(out[0])["hits"][0]
    assert best["id"] == "tea"
    assert "hot" in {word for word, _ in best["words"]}


def test_bad_input_is_one_line_with_file_and_line_number(run, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": 1, "text": "one"}\n{"id": 2}\n')
    code, out, err = run("index", bad, "--store", tmp_path / "s", "--json")
    assert (code, json.loads(out[0])) == (3, {"written": 1, "refused": 1, "texts": 1})
    assert f"vdr-db: {bad}:2: the field 'text' is missing" in err
    assert "Traceback" not in err
    code, _, err = run("index", tmp_path / "none.jsonl", "--store", tmp_path / "s")
    assert (code, "no such file" in err) == (2, True)
    code, _, err = run("encode")
    assert (code, "Pass texts or --input" in err) == (2, True)
    code, _, err = run("encode", "x", "--out", "a.parquet")
    assert (code, "must end in .npz or .jsonl" in err) == (2, True)
    code, _, err = run("encode", "x", "--model", tmp_path)
    assert (code, err.count("\n")) == (2, 1)


def test_index_reads_parquet_and_packed_files(run, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": ["a", "b"], "text": ["a cat", "a dog"], "year": [1999, 2020]})
    parquet.write_table(table, tmp_path / "pets.parquet")
    packed = pyarrow.compress(b'{"id": "c", "text": "a bird"}\n', codec="zstd", asbytes=True)
    (tmp_path / "birds.jsonl.zst").write_bytes(packed)
    place = ("--store", tmp_path / "s")
    files = (tmp_path / "pets.parquet", tmp_path / "birds.jsonl.zst")
    code, out, _ = run("index", *files, *place, "--json")
    assert (code, json.loads(out[0])) == (0, {"written": 3, "refused": 0, "texts": 3})
    code, out, _ = run("search", "dog", *place, "--filter", '{"year": {"gte": 2000}}', "--json")
    assert (code, [hit["id"] for hit in json.loads(out[0])["hits"]]) == (0, ["b"])


def test_debug_shows_the_traceback(tmp_path):
    process = in_process("encode", "--input", tmp_path / "none.jsonl", "--debug", cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" in err


def test_store_errors_are_3(run, tmp_path, store):
    code, _, err = run("search", "x", "--store", tmp_path / "none")
    assert (code, err.startswith("vdr-db: There is no store at")) == (3, True)
    assert not (tmp_path / "none").exists()
    code, _, err = run("search", "x", "--store", store, "--collection", "other")
    assert (code, err.count("\n")) == (3, 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    code, _, err = run("index", NOTES, "--store", tmp_path / "full")
    assert code == 3
    assert (tmp_path / "full" / "diary.txt").read_text() == "mine"


def test_a_missing_package_is_4(run, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    code, _, err = run("search", "tea", "--store", store)
    assert code == 4
    assert "pip install 'vdr-db[cli]'" in err
    assert run("search", "tea", "--store", store, "--json")[0] == 0


def test_info(run, store):
    code, out, _ = run("info", "--store", store, "--model", "vdr-mini", "--json")
    facts = json.loads(out[0])
    assert code == 0
    assert facts["collection"]["texts"] == 3
    assert facts["collection"]["made with"]["model"] == "vdr-mini"
    assert facts["model"]["tokenizer"] == facts["collection"]["made with"]["tokenizer"]
    code, out, _ = run("info")
    assert out[0].split()[0] == "vdr-db"


def test_info_warns_of_texts_in_another_language(run, store, tmp_path):
    assert "language" not in run("info", "--store", store)[2]
    notes = tmp_path / "notes.jsonl"
    notes.write_text('{"id": "a", "text": "быстрая коричневая лиса"}\n', "utf-8")
    run("index", notes, "--store", tmp_path / "s", "--model", "vdr-mini")
    code, _, err = run("info", "--store", tmp_path / "s")
    assert code == 0
    assert "in a language that the model was not made for" in " ".join(err.split())


def test_evaluate(run, tmp_path):
    folder = tmp_path / "tiny"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(NOTES.read_text().replace('"id"', '"_id"'))
    (folder / "queries.jsonl").write_text(
        '{"_id": "q1", "text": "a tall beast"}\n{"_id": "q2", "text": "hot tea"}\n'
        '{"_id": "q3", "text": "not judged"}\n'
    )
    (folder / "qrels" / "test.tsv").write_text("q1\tzoo\t1\nq2\ttea\t2\nq3\ttea\t0\n")
    code, out, _ = run("evaluate", folder, "--json")
    model, bm25 = (json.loads(line) for line in out)
    assert code == 0
    assert (model["collection"], model["documents"], model["queries"]) == ("tiny", 3, 2)
    assert (model["ranker"], bm25["ranker"]) == ("vdr-mini", "BM25")
    assert model["ndcg_10"] == model["recall_100"] == model["mrr_10"] == 1.0
    assert bm25["recall_100"] == 0.5  # no word of "a tall beast" is in the text
    assert model["document_nonzeros"] > 10
    assert model["search_ms"] > 0
    code, out, _ = run("evaluate", folder)
    assert out[0].rstrip() == "tiny: 3 documents, 2 judged queries"
    assert [line.split()[0] for line in out[1:]] == ["ranked", "vdr-mini", "BM25"]
    (folder / "qrels" / "test.tsv").write_text("q9\tzoo\t1\n")
    code, _, err = run("evaluate", folder)
    assert (code, "0 such queries" in err) == (2, True)
    (folder / "qrels" / "test.tsv").write_text("q1\tzoo\t1\n")
    (folder / "corpus.jsonl").write_text('{"_id": "zoo", "text": "..."}\n')
    code, _, err = run("evaluate", folder)
    assert (code, "no document has a word" in err) == (2, True)


def test_a_text_cannot_drive_the_terminal(run, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"id": "\u001b[31mred", "title": "tea\u0007\nmore", "text": "\u009b2J \u202e"})
    )
    assert run("index", tmp_path / "a.jsonl", "--store", tmp_path / "s")[0] == 0
    _, out, _ = run("search", "tea", "--store", tmp_path / "s")
    assert not any(character in "\n".join(out) for character in "\u001b\u0007\u009b\u202e")


def test_a_closed_pipe_ends_quietly(tmp_path):
    process = in_process("encode", *(["tea"] * 20), "--json", cwd=tmp_path)
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=120)
    assert err == ""
    assert process.returncode == 141


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_is_130(tmp_path):
    process = in_process("index", "-", "--store", "s", stdin=subprocess.PIPE, cwd=tmp_path)
    try:
        # It waits for standard input once the model is loaded; before, it is still importing.
        deadline = time.monotonic() + 120
        while not _waits_for_input(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "vdr-db: stopped"
    assert "Traceback" not in err


def _waits_for_input(pid):
    """Whether its main thread reads standard input; imports read pipes of their own children."""
    process = Path(f"/proc/{pid}")
    try:
        call = (process / "syscall").read_text().split()
        return call[1:2] == ["0x0"] and "pipe" in (process / "wchan").read_text()
    except OSError:
        return False


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("search tea --store {store} 2>&-", 0),
        ("search tea --store {store} >&-", 141),
        ("search tea --store {store} --json >&-", 141),
        ("search tea --store {store} --json <&- 2>&- >/dev/null", 0),
        ("search nothing --store none 2>&-", 3),
        ("index - --store s <&-", 2),
        ("index {notes} --store s >&- 2>&- <&-", 0),
        ("search tea --store {store} | head -0; (exit ${{PIPESTATUS[0]}})", 141),
        ("encode --input texts.txt | head -1 >/dev/null; (exit ${{PIPESTATUS[0]}})", 141),
        ("--help | head -0; (exit ${{PIPESTATUS[0]}})", 141),
    ],
)
def test_closed_streams_and_readers_that_leave(tmp_path, store, command, code):
    (tmp_path / "texts.txt").write_text("tea and cake\n" * 600)
    shell = command.format(store=store, notes=NOTES)
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m vdr_db.cli {shell}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("width", [30, 45, 60])
def test_a_narrow_terminal_shows_ids_texts_and_words(run, store, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = run("search", "a tall beast", "--store", store, "--limit", "1")
    assert code == 0
    shown = " ".join(" ".join(out).split())
    assert "zoo Gir" in shown
    assert "tall" in shown
    assert "The tallest" in shown
    assert max(map(len, out)) <= width


def test_progress_is_logged_where_it_is_asked_for(tmp_path):
    for more, is_told in (
        ((), True),
        (("--progress", "log"), True),
        (("--progress", "none"), False),
    ):
        process = in_process(*("ingest", NOTES, "--store", "s", "--no-ledger", *more), cwd=tmp_path)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert ("read 3, encoded 3, acknowledged 3" in err) == is_told
