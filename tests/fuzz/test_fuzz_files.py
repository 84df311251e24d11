"""Mutants of models, ledgers and spools: each is read, or refused by an error of ours.

`VDR_DB_FUZZ_FILES` multiplies their numbers.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import warnings
from collections import Counter

import pytest

from vdr_db.errors import VdrError
from vdr_db.ingest.ledger import Ledger, Ranges, Sampled

TIMES = int(os.environ.get("VDR_DB_FUZZ_FILES", "1"))
MODELS, LEDGERS, SPOOLS = 700 * TIMES, 500 * TIMES, 500 * TIMES
SEED = 20
ODD = [
    *(None, True, False, 0, 1, -1, 3, 0.5, 1e308, 2**31, 2**63, 10**30, "", "x", "../x", "\0"),
    *("\ud800", [], {}, [[]], {"a": 1}, ["a"], [1, 2, 3], "999999999", "relu", "mlm"),
]


def altered(content, draw):
    """Some bytes changed, cut out, doubled, or the end cut off."""
    made = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(made))
        kind = draw.randrange(5)
        if kind <= 1:
            made[at] = draw.choice([0, 255, 34, 123, made[at] ^ (1 << draw.randrange(8))])
        elif kind == 2:
            del made[at : at + draw.randint(1, 9)]
        elif kind == 3:
            made[at:at] = made[at : at + draw.randint(1, 9)]
        else:
            del made[max(at, 1) :]
        made = made or bytearray(b"\0")
    return bytes(made)


def odd_value(content, draw):
    """A JSON value with one thing changed: a value, or a key gone."""
    places = [content]
    for place in places:
        children = list(place.values() if isinstance(place, dict) else place)
        places += [one for one in children[:40] if isinstance(one, (dict, list))]
    place = draw.choice([one for one in places if one] or [content])
    key = draw.choice(list(place) if isinstance(place, dict) else list(range(len(place))))
    if draw.random() < 0.2:
        del place[key]
    else:
        place[key] = draw.choice(ODD)
    return content


def told(what, seen):
    print(f"{what}: {seen['read']} read, {seen['refused']} refused")  # noqa: T201, for the log of CI


def attempt(use, said, seen):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            use()
        except (VdrError, ImportError):
            seen["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {error} for {said}") from error
        else:
            seen["read"] += 1


def mutant_of(folder, place, draw, *, kept=()):
    """A copy with one file changed; its name and how."""
    shutil.copytree(folder, place, copy_function=os.link)
    files = [one for one in sorted(folder.rglob("*")) if one.is_file() and one.suffix not in kept]
    file = draw.choice(files)
    content, target = file.read_bytes(), place / file.relative_to(folder)
    if file.suffix == ".json" and draw.random() < 0.7:
        made = json.dumps(odd_value(json.loads(content), draw)).encode()
    else:
        made = altered(content, draw)
    target.unlink()
    target.write_bytes(made)
    return f"{target.name}: {made[:2000]!r}"


@pytest.mark.timeout(600)
def test_mutants_of_models(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    from model_folders import write_bert

    from vdr_db import SparseEncoder
    from vdr_db.encoders.export import export

    export(write_bert(tmp_path / "source"), tmp_path / "model")
    draw, seen = random.Random(SEED), Counter()
    for number in range(MODELS):
        place = tmp_path / f"m{number}"
        source = tmp_path / ("model" if number % 3 else "source")
        # ONNX Runtime takes the process down with some graphs that are damaged
        said = mutant_of(source, place, draw, kept=(".onnx", ".md", ".py"))

        def use(place=place):
            encoder = SparseEncoder.from_pretrained(place, device="cpu")
            repr(encoder)
            encoder.stamp()
            encoder.encode_documents(["the cat", ""])

        attempt(use, said, seen)
        shutil.rmtree(place)
    told("models", seen)
    assert seen["read"]
    assert seen["refused"]


def write_ledger(file):
    description = {
        "input": {"files": [{"name": "a.jsonl", "size": 3, "mtime_ns": 5}], "slice": "0/1"},
        "encoder": {"tokenizer": "t", "k": None, "settings": "s"},
        "policy": {"empty": "store"},
        "store": {"kind": "MemoryStore", "name": "m"},
    }
    import numpy as np

    sample = [Sampled("a", np.array([1, 2], np.int32), np.array([0.5, 1], np.float32))]
    with Ledger(file, description) as ledger:
        ledger.commit(Ranges([(0, 40), (50, 60)]), {"acknowledged": 50}, sample)
    return description


def test_mutants_of_ledgers(tmp_path):
    whole = tmp_path / "whole.db"
    description = write_ledger(whole)
    draw, seen = random.Random(SEED), Counter()
    columns = {
        "runs": ("run", "description", "is_complete"),
        "settled": ("start", "stop", "run"),
        "counters": ("name", "value", "run"),
        "sample": ("slot", "id", "indices", "weights", "run"),
    }
    for number in range(LEDGERS):
        file = tmp_path / f"{number}.db"
        if draw.random() < 0.5:
            file.write_bytes(altered(whole.read_bytes(), draw))
            said = "bytes"
        else:
            shutil.copy(whole, file)
            table = draw.choice(list(columns))
            column, value = draw.choice(columns[table]), draw.choice(ODD)
            if column == "description" and draw.random() < 0.7:
                value = json.dumps(odd_value(json.loads(json.dumps(description)), draw))
            if not isinstance(value, (str, int, float, type(None))) or value == "\ud800":
                value = repr(value).encode()
            said = f"{table}.{column} = {value!r}"
            connection = sqlite3.connect(file)
            try:
                connection.execute(f"UPDATE {table} SET {column} = ?", (value,))
                connection.commit()
            except (sqlite3.Error, OverflowError):
                pass  # what SQLite itself refuses
            finally:
                connection.close()

        def use(file=file):
            with Ledger(file, description) as ledger:
                ledger.commit(ledger.settled, ledger.counters, ledger.sample)
            Ledger.last_of(file, description["input"])

        attempt(use, said, seen)
    told("ledgers", seen)
    assert seen["read"]
    assert seen["refused"]


def test_mutants_of_spools(tmp_path):
    pytest.importorskip("pyarrow")
    from hashing_encoder import HashingEncoder

    from vdr_db.ingest import encode_to_spool
    from vdr_db.ingest.checking import check_spool
    from vdr_db.ingest.source import Window
    from vdr_db.ingest.spool_source import SpoolSource

    source = tmp_path / "texts.txt"
    source.write_text("".join(f"text {i}\n" for i in range(30)))
    whole = tmp_path / "whole"
    encode_to_spool([str(source)], whole, encoder=HashingEncoder())
    draw, seen = random.Random(SEED), Counter()
    for number in range(SPOOLS):
        place = tmp_path / f"s{number}"
        said = mutant_of(whole, place, draw, kept=("",))

        def use(place=place):
            # without the digests, so that the reader of parts sees the damage
            for block in SpoolSource(place, is_checked=False).blocks(Ranges(), Window()):
                len(block.records)
            encode_to_spool([str(source)], place, encoder=HashingEncoder())
            assert isinstance(check_spool(place).problems, list)

        attempt(use, said, seen)
        shutil.rmtree(place)
    told("spools", seen)
    assert seen["read"]
    assert seen["refused"]
