"""Readers: what every format yields, and that every fault names its file and line."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdr_db.errors import ConfigError, InputError
from vdr_db.readers import BeirFolder, Fields, Record, read_records


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text if isinstance(text, bytes) else text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson"])
def test_jsonl(tmp_path, name):
    path = write(
        tmp_path,
        name,
        '{"_id": "x", "text": "one", "year": 1999}\n\n{"id": 7, "title": "T", "text": "two"}\r\n'
        '{"text": "three"}',
    )
    assert list(read_records(path)) == [
        Record("x", "one", {"year": 1999}, f"{path}:1"),
        Record(7, "T two", {"title": "T"}, f"{path}:3"),
        Record(f"{path}:4", "three", {}, f"{path}:4"),
    ]


def test_gzip_is_seen_from_the_bytes_not_the_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(b'{"id": 1, "text": "one"}\n'))
    assert [record.text for record in read_records(path)] == ["one"]


def test_named_fields(tmp_path):
    path = write(
        tmp_path,
        "a.jsonl",
        '{"key": "k", "head": "H", "body": "B", "id": "other", "n": 1}\n'
        '{"key": "l", "head": "", "body": "C"}\n',
    )
    fields = Fields(id="key", text=("head", "body"))
    assert list(read_records(path, fields=fields)) == [
        Record("k", "H B", {"head": "H", "id": "other", "n": 1}, f"{path}:1"),
        Record("l", "C", {"head": ""}, f"{path}:2"),
    ]
    chosen = Fields(id="key", text=("body",), payload=("n",))
    assert [record.payload for record in read_records(path, fields=chosen)] == [{"n": 1}, {}]


def test_one_field_name_must_be_in_a_tuple():
    with pytest.raises(TypeError, match=r"\('body',\)"):
        Fields(text="body")


def test_csv_with_quotes_line_breaks_and_a_byte_order_mark(tmp_path):
    path = write(tmp_path, "a.csv", '\ufeffid,text,tag\r\n1,"a, ""b""\nand c",x\r\n\r\n2,d,y\r\n')
    assert list(read_records(path)) == [
        Record("1", 'a, "b"\nand c', {"tag": "x"}, f"{path}:2"),
        Record("2", "d", {"tag": "y"}, f"{path}:5"),
    ]


def test_tsv_takes_quotation_marks_as_they_are(tmp_path):
    path = write(tmp_path, "a.tsv.gz", 'id\ttext\n1\t"one\n2\ttwo"\n')
    assert [record.text for record in read_records(path)] == ['"one', 'two"']


def test_plain_lines(tmp_path):
    path = write(tmp_path, "a.txt", "one\n \ntwo")
    assert list(read_records(path)) == [
        Record(f"{path}:1", "one", {}, f"{path}:1"),
        Record(f"{path}:3", "two", {}, f"{path}:3"),
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_standard_input(monkeypatch, packed):
    data = b'{"id": 1, "text": "one"}\n'
    stream = io.BufferedReader(io.BytesIO(gzip.compress(data) if packed else data))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
    assert list(read_records("-")) == [Record(1, "one", {}, "<stdin>:1")]


def test_an_empty_file_holds_no_record(tmp_path):
    for name in ("a.jsonl", "a.csv", "a.tsv", "a.txt", "a.jsonl.gz"):
        assert list(read_records(write(tmp_path, name, ""))) == []


RANGES = (range(3000), range(3000, 5000))
GOOD = '{"id": 1, "text": "one"}\n'


@pytest.mark.parametrize(
    ("name", "text", "line", "message"),
    [
        ("a.jsonl", GOOD + "{'id': 2}\n", 2, "not a line of JSON"),
        ("a.jsonl", GOOD + '{"id": 2, "text": ', 2, "not a line of JSON"),
        ("a.jsonl", '{"id": 1, "text": "one", "n": NaN}\n', 1, "NaN is not a JSON number"),
        ("a.jsonl", '{"id": 1, "text": "one", "n": ' + "9" * 5000 + "}", 1, "not a line of JSON"),
        ("a.jsonl", "[" * 200_000, 1, "not a line of JSON"),
        ("a.jsonl", '[{"id": 1}]\n', 1, "expected one JSON object a line, got a list"),
        ("a.jsonl", GOOD + '{"id": 2, "body": "x"}\n', 2, "'text' is missing; this record has"),
        ("a.jsonl", "{}\n", 1, "this record has no field"),
        ("a.jsonl", '{"id": 1, "text": 3}', 1, "'text' must be a text, got the number 3"),
        ("a.jsonl", '{"id": 1, "text": null}', 1, "'text' must be a text, got null"),
        ("a.jsonl", '{"id": 1, "title": [], "text": "x"}', 1, "'title' must be a text, got a list"),
        ("a.jsonl", '{"id": "", "text": "x"}', 1, "'id' must be .*, got an empty text"),
        ("a.jsonl", '{"id": true, "text": "x"}', 1, "'id' must be .*, got true or false"),
        ("a.jsonl", '{"id": 1.5, "text": "x"}', 1, "'id' must be .*, got the number 1.5"),
        ("a.jsonl", '{"id": 1, "text": "\\ud83d!"}', 1, "half of a surrogate pair"),
        ("a.jsonl", '{"id": 1, "text": "x", "\\uDE00": 1}', 1, "half of a surrogate pair"),
        ("a.jsonl", GOOD.encode() + b'{"id": "\xff"}', 2, "byte 0xff at column 9 is not UTF-8"),
        ("a.jsonl.gz", GOOD.encode("utf-16"), 1, "is not UTF-8"),
        ("a.csv", "id,text\n1,a\n2\n", 3, "expected 2 cells as in the header, got 1"),
        ("a.csv", "id,text\n1,a,b\n", 2, "expected 2 cells as in the header, got 3"),
        ("a.csv", 'id,text\n1,"never closed\n\n', 2, "not a row of CSV"),
        ("a.csv", "id,id,text\n", 1, "names id more than once"),
        ("a.csv", "id,body\n1,a\n", 2, "'text' is missing"),
        ("a.tsv", "id\ttext\n1\ta\n2,b\n", 3, "expected 2 cells"),
        ("a.txt", b"fine\n\x80\n", 2, "is not UTF-8"),
    ],
)
def test_faults_name_file_and_line(tmp_path, name, text, line, message):
    path = write(tmp_path, name, text)
    with pytest.raises(InputError, match=message) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{path}:{line}: ")


def packed(content, end):
    """Bytes as another program packs them."""
    if end == ".gz":
        return gzip.compress(content)
    return pytest.importorskip("pyarrow").compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize("end", [".gz", ".zst"])
def test_packed_files_are_read_whole(tmp_path, end):
    path = tmp_path / f"a.jsonl{end}"
    halves = [b"".join(b'{"id": %d, "text": "t"}\n' % i for i in part) for part in RANGES]
    path.write_bytes(b"".join(packed(half, end) for half in halves))  # both are kept one by one
    assert [record.id for record in read_records(path)] == list(range(5000))
    folder = tmp_path / "beir"
    folder.mkdir()
    (folder / f"corpus.jsonl{end}").write_bytes(packed(halves[0], end))
    assert sum(1 for _ in read_records(folder)) == len(RANGES[0])


@pytest.mark.parametrize("cut", [15, 60, -6])
@pytest.mark.parametrize("end", [".gz", ".zst"])
def test_truncated_files_name_the_line(tmp_path, cut, end):
    whole = packed(b"".join(b'{"id": %d, "text": "t"}\n' % i for i in range(5000)), end)
    path = tmp_path / f"a.jsonl{end}"
    path.write_bytes(whole[:cut])
    with pytest.raises(InputError, match=rf"{path}:\d+: the packed data ends early or is damaged"):
        list(read_records(path))


def test_damaged_gzip_names_the_line(tmp_path):
    whole = bytearray(gzip.compress(b'{"id": 1, "text": "t"}\n'))
    whole[-8] ^= 255
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(bytes(whole))
    with pytest.raises(InputError, match="the packed data ends early or is damaged"):
        list(read_records(path))


def test_errors_come_after_the_good_records(tmp_path):
    path = write(tmp_path, "a.jsonl", GOOD + "oops\n")
    records = read_records(path)
    assert next(records).id == 1
    with pytest.raises(InputError, match=":2:"):
        next(records)


def test_duplicate_ids_are_an_error_where_asked(tmp_path):
    path = write(tmp_path, "a.jsonl", GOOD + GOOD)
    assert len(list(read_records(path))) == 2
    with pytest.raises(InputError, match=rf"a.jsonl:2: the id 1 was already used at {path}:1"):
        list(read_records(path, unique=True))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        list(read_records(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="cannot tell the format"):
        read_records(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="must be one of jsonl, csv, tsv, text, beir"):
        read_records(tmp_path / "a.jsonl", format="xml")
    with pytest.raises(InputError, match="is not a BEIR folder"):
        list(read_records(tmp_path))


@pytest.fixture
def beir(tmp_path):
    write(
        tmp_path,
        "corpus.jsonl.gz",
        '{"_id": "d1", "title": "T", "text": "one", "metadata": {"year": 1}}\n'
        '{"_id": 2, "title": "", "text": "two"}\n',
    )
    write(tmp_path, "queries.jsonl", '{"_id": "q1", "text": "ask"}\n')
    write(tmp_path, "qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t3\nq1\t2\t0\n")
    return tmp_path


def test_beir_folder(beir):
    folder = BeirFolder(beir)
    assert [(r.id, r.text, r.payload) for r in folder.documents()] == [
        ("d1", "T one", {"title": "T", "metadata": {"year": 1}}),
        ("2", "two", {"title": ""}),
    ]
    assert [(r.id, r.text) for r in folder.queries()] == [("q1", "ask")]
    assert folder.judgements() == {"q1": {"d1": 3, "2": 0}}
    assert [record.id for record in read_records(beir)] == ["d1", "2"]


def test_beir_splits(beir):
    write(beir, "qrels/dev.tsv", "q9\td9\t1\n")
    assert BeirFolder(beir).judgements() == {"q1": {"d1": 3, "2": 0}}
    assert BeirFolder(beir, split="dev").judgements() == {"q9": {"d9": 1}}
    with pytest.raises(InputError, match="no judgements 'train': it holds dev, test"):
        BeirFolder(beir, split="train").judgements()
    (beir / "qrels" / "test.tsv").unlink()
    assert BeirFolder(beir).judgements() == {"q9": {"d9": 1}}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("q1\td1\n", 1, "got 2 cells"),
        ("query-id\tcorpus-id\tscore\nq1 d1 1\n", 2, "got 1 cells"),
        ("q1\td1\t0.5\n", 1, "must be a whole number, got '0.5'"),
        ("q1\td1\t1\nq1\td1\t2\n", 2, "judged twice for query 'q1', as 1 and 2"),
    ],
)
def test_bad_judgements(beir, text, line, message):
    path = write(beir, "qrels/test.tsv", text)
    with pytest.raises(InputError, match=message) as caught:
        BeirFolder(beir).judgements()
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_beir_folder_with_missing_parts(beir, tmp_path):
    (beir / "queries.jsonl").unlink()
    with pytest.raises(InputError, match=r"queries\.jsonl or queries\.jsonl\.gz"):
        list(BeirFolder(beir).queries())
    write(beir, "corpus.jsonl.gz", '{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n')
    with pytest.raises(InputError, match="already used"):
        list(BeirFolder(beir).documents())


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8"), min_size=1), st.text(st.characters(codec="utf-8"))
        ),
        unique_by=lambda row: row[0],
    )
)
def test_any_text_survives_jsonl(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    for ascii_only in (True, False):
        lines = [json.dumps({"id": i, "text": t}, ensure_ascii=ascii_only) for i, t in rows]
        path.write_bytes("\n".join(lines).encode("utf-8"))
        read = [(r.id, r.text) for r in read_records(path, unique=True)]
        assert read == rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.txt"])
def test_a_cell_may_be_long(tmp_path, name):
    long = "x" * (1 << 20)
    text = {
        "a.jsonl": json.dumps({"id": "1", "text": long}),
        "a.csv": f'id,text\n1,"{long}"\n',
        "a.tsv": f"id\ttext\n1\t{long}\n",
        "a.txt": long,
    }[name]
    (record,) = read_records(write(tmp_path, name, text))
    assert record.text == long


TABLE = """_id,text,year,price,open,code,day,big,half,none
a,1,1999,1,true,007,2024-01-02,9223372036854775808,5,
b,2,-3,2.5e3,FALSE,12,2024-01-03,1,,
"""


@pytest.mark.parametrize("end", ["csv", "tsv"])
def test_columns_of_numbers_are_numbers(tmp_path, end):
    table = TABLE if end == "csv" else TABLE.replace(",", "\t")
    first, second = read_records(write(tmp_path, f"a.{end}", table))
    assert (first.id, first.text) == ("a", "1"), "ids and texts stay as they are"
    assert first.payload == {
        **{"year": 1999, "price": 1.0, "open": True, "code": "007", "day": "2024-01-02"},
        **{"big": "9223372036854775808", "half": 5, "none": ""},
    }
    assert type(first.payload["price"]) is float
    assert (second.payload["year"], second.payload["open"]) == (-3, False)
    assert "half" not in second.payload, "an empty cell of numbers is no field"


def test_kinds_of_columns_may_be_told(tmp_path):
    path = write(tmp_path, "a.csv", "_id,text,zip,n\na,x,12345,1\nb,y,99,two\n")
    fields = Fields(kinds=(("zip", "text"), ("n", "int")))
    first, second = read_records(path, fields=fields, lenient=True)
    assert first.payload == {"zip": "12345", "n": 1}
    assert second.fault == "the column 'n' is int, got 'two'."
    with pytest.raises(ConfigError, match="kind of column 'n' must be one of int, float"):
        Fields(kinds=(("n", "integer"),))


@pytest.mark.parametrize(
    ("text", "delimiter"),
    [
        ("_id;text\n1;a, b\n", None),
        ("sep=;\n_id;text\n1;a, b\n", None),
        ("sep=|\r\n_id|text\r\n1|a, b\r\n", None),
        ("_id|text\n1|a, b\n", "|"),
        ('_id\ttext\n1\t"a, b"\n', None),
        ('_id,text\r1,"a, b"\r', None),
        ('\ufeff_id,text\n1,"a, b"\n', None),
    ],
)
def test_ways_to_write_csv(tmp_path, text, delimiter):
    path = write(tmp_path, "a.csv", text)
    (record,) = read_records(path, fields=Fields(delimiter=delimiter))
    assert (record.id, record.text) == ("1", "a, b")
    assert record.source.endswith(":3" if text.startswith("sep=") else ":2")


def test_marks_in_the_middle_and_ends_of_old_programs(tmp_path):
    joined = b'\xef\xbb\xbf{"id": 1, "text": "a"}\n\xef\xbb\xbf{"id": 2, "text": "b"}\n'
    assert [r.text for r in read_records(write(tmp_path, "a.jsonl", joined))] == ["a", "b"]
    old = b'{"id": 1, "text": "a"}\r{"id": 2, "text": "b"}\r'
    assert [r.source[-2:] for r in read_records(write(tmp_path, "b.jsonl", old))] == [":1", ":2"]
    mixed = b"a progress bar\rdone\nnext\n"
    texts = [record.text for record in read_records(write(tmp_path, "c.txt", mixed))]
    assert texts == ["a progress bar\rdone", "next"]


def test_fields_inside_of_objects(tmp_path):
    line = {"id": 1, "content": {"body": "deep", "n": 2}, "content.n": 3}
    path = write(tmp_path, "a.jsonl", json.dumps(line))
    fields = Fields(text=("content.body",), payload=("content.n", "content.body", "no.where"))
    (record,) = read_records(path, fields=fields)
    assert record.text == "deep"
    assert record.payload == {"content.n": 3, "content.body": "deep"}
    with pytest.raises(InputError, match=r"got an object; name a field in it, such as content\.bo"):
        list(read_records(path, fields=Fields(text=("content",))))


def test_what_cannot_be_read_is_a_record_of_its_own(tmp_path):
    table = "id,text\n1,a\n2\n3,\udce9\n4,d\n".encode("utf-8", "surrogateescape")
    path = write(tmp_path, "a.csv", table)
    records = list(read_records(path, lenient=True))
    assert [record.text for record in records] == ["a", "", "", "d"]
    assert "expected 2 cells" in records[1].fault
    assert "byte 0xe9 at column 1 is not UTF-8" in records[2].fault
    assert records[1].id == records[1].source == f"{path}:3"


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes")
def test_a_file_name_need_not_be_text(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "w", encoding="utf-8") as file:
        file.write("one\ntwo\n")
    first, second = read_records(os.fsdecode(path))
    assert first.id == f"{tmp_path}/caf\\xe9.txt:1"
    assert second.source.encode(), "it can be stored and shown"
