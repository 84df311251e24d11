"""Runs the Triton tests under Triton's interpreter, in a process of its own.

The switch must be set before kernels are defined, and it holds for a whole process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest

FILES = (
    "test_pooling_triton.py",
    "test_backward_triton.py",
    "test_topk_triton.py",
    "test_scan_triton.py",
    "test_arguments.py",
    "test_ops_triton.py",
    "test_query_graphs_triton.py",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """File -> its process once it ended, and the process's report.

    A process imports torch and Triton for seconds, so it takes as many files as it can: there is
    one for each core that is ours, of one thread.
    """
    here = Path(__file__).parent
    settings = ["-c", str(here.parents[1] / "pyproject.toml"), "-p", "no:cacheprovider"]
    processes = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    groups = [group for i in range(processes) if (group := FILES[i::processes])]

    def run(group):
        folder = tmp_path_factory.mktemp("interpreter")
        # from elsewhere: in the root, the folder `vdr_db` would hide the installed package
        finished = subprocess.run(
            [sys.executable, "-m", "pytest", *settings, "--maxfail=3", "--junit-xml=report.xml",
             *(str(here / file) for file in group)],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
        )  # fmt: skip
        return finished, folder / "report.xml"

    with ThreadPoolExecutor(processes) as pool:
        runs = [(group, pool.submit(run, group)) for group in groups]
        yield {file: run for group, run in runs for file in group}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("file", FILES)
def test_under_the_interpreter(file, outcomes):
    finished, report = outcomes[file].result()
    output = finished.stdout + finished.stderr
    assert finished.returncode in (0, 1), output  # 1: some test failed, perhaps of another file
    module, cases = Path(file).stem, ElementTree.parse(report).iter("testcase")
    cases = [case for case in cases if module in case.get("classname").split(".")]
    assert cases, output
    for case in cases:
        faults = [part.tag for part in case if part.tag in ("failure", "error", "skipped")]
        assert not faults, f"{case.get('name')}: {faults}\n{output}"
