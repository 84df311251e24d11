"""Runs the Triton tests under Triton's interpreter, in a process of its own.

The switch must be set before kernels are defined, and it holds for a whole process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FILES = (
    "test_pooling_triton.py",
    "test_backward_triton.py",
    "test_topk_triton.py",
    "test_arguments.py",
    "test_ops_triton.py",
    "test_query_graphs_triton.py",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """File -> its process once it ended; as many at once as there are cores, one thread each."""
    here = Path(__file__).parent
    settings = ["-c", str(here.parents[1] / "pyproject.toml"), "-p", "no:cacheprovider", "-x"]

    folders = {file: tmp_path_factory.mktemp(Path(file).stem) for file in FILES}

    def run(file):
        # from elsewhere: in the root, the folder `vdr_db` would hide the installed package
        return subprocess.run(
            [sys.executable, "-m", "pytest", *settings, str(here / file)],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            cwd=folders[file],
            capture_output=True,
            text=True,
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {file: pool.submit(run, file) for file in FILES}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("file", FILES)
def test_under_the_interpreter(file, outcomes):
    finished = outcomes[file].result()
    output = finished.stdout + finished.stderr
    assert finished.returncode == 0, output
    assert re.search(r"[1-9]\d* passed", output), output
    assert "skipped" not in output, output
