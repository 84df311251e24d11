"""The ingest script of `examples/`, as a person runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "ingest.py"


def test_the_script_ingests_and_goes_on(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"_id": i, "text": f"note {i}"}) + "\n" for i in range(3)))
    for told in ("3 written, 0 refused", "0 written, 0 refused"):
        command = [sys.executable, str(SCRIPT), "store", "notes", "corpus.jsonl"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert told in done.stdout
    assert (tmp_path / "notes.ledger").exists()
