"""The recipe of `docs/spark.md`, run as it is written, on Spark's local mode.

Needs PySpark (`pip install pyspark`, some 450 MB) and a Java runtime of version 17 or later;
without one of them it is skipped and says which. Local mode is one machine with two worker
processes: what a real cluster adds, such as speculative copies and lost executors, only a cluster
proves.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOC = Path(__file__).parents[2] / "docs" / "spark.md"
TEXTS = [
    "Giraffes are the tallest animals on land.",
    "Green tea is brewed from leaves that are not fermented.",
    "The theory of relativity was published by Einstein.",
]


def recipe():
    (block,) = re.findall(
        r"^```python\n(.*?)^```$", DOC.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    return block


def put(code, old, new):
    assert code.count(old) == 1, old
    return code.replace(old, new)


def test_the_recipe_is_python():
    compile(recipe(), str(DOC), "exec")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_recipe_writes_every_partition_once(tmp_path, tiny_splade, tiny_splade_folder):
    """Three partitions in two workers write to one server; a second run changes nothing."""
    if importlib.util.find_spec("pyspark") is None:
        pytest.skip("PySpark is not installed: pip install pyspark")
    if shutil.which("java") is None:
        pytest.skip("PySpark needs a Java runtime: apt-get install default-jre-headless")
    from qdrant_contract_server import QdrantContractServer

    from vdr_db.connectors.qdrant.store import QdrantStore

    rows = [
        {"id": f"n{i}", "text": f"{TEXTS[i % 3]} Note {i}.", "n": i, "tags": ["a", str(i % 2)]}
        for i in range(60)
    ]
    bad = [{"id": "no-text", "n": 1}, {"text": "no id"}]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for k in range(3):
        part = (rows + bad)[k::3]
        (corpus / f"{k}.json").write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    with QdrantContractServer(tmp_path / "server") as server:
        place = {"url": server.url, "client_options": {"grpc_port": server.grpc_port}}
        code = put(recipe(), '"naver/splade-v3"', repr(str(tiny_splade_folder)))
        code = put(code, '{"url": "https://qdrant.example:6333"}', repr(place))
        code = put(code, '"corpus/"', repr(str(corpus)))
        session = (
            "SparkSession.builder.master('local[2]').config('spark.ui.enabled', 'false')"
            ".config('spark.driver.memory', '512m')"
            ".config('spark.sql.files.openCostInBytes', 2**27)"  # one partition for each file
        )
        code = put(code, "SparkSession.builder", session)
        again = code[code.index("outcome = ") :]  # in one session: starting Java is what takes long
        (tmp_path / "job.py").write_text(code + again + "spark.stop()\n", "utf-8")
        environment = {
            **os.environ,
            "PYSPARK_PYTHON": sys.executable,
            "SPARK_LOCAL_IP": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "job.py"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        told = done.stdout.splitlines()
        assert told[0] == "written: 60 stored: 60"
        assert [line.split(":")[1] for line in told[1:3]] == [" ", " no-text"]
        assert "its vector has no weight" in told[2]
        assert told[3:] == told[:3]
        assert server.written_points == 120
        with QdrantStore("articles", **place) as store:
            assert store.stamp == tiny_splade.stamp()
            found = store.get([row["id"] for row in rows], with_rows=True)
            expected = tiny_splade.encode_documents([row["text"] for row in rows])
            for i, (one, row) in enumerate(zip(found, rows, strict=True)):
                assert (one.payload["n"], one.payload["tags"]) == (i, row["tags"])
                assert one.payload["text"] == row["text"]
                assert one.row.allclose(expected[i], rtol=1e-5)
