"""The kernel benchmark runs from end to end without a GPU, and prints no speed on a red check."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "bench_kernels.py"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    specification = importlib.util.spec_from_file_location("bench_kernels", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "bench_kernels", module)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(900)  # about 40 s on two free cores
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_dry_run(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), "--dry-run", "--autotune"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    output = finished.stdout
    assert finished.returncode == 0, output + finished.stderr[-4000:]
    assert "2 shapes agree with float64" in output
    for arm in ("torch.mm", "eager", "torch.compile", "chunked cuBLAS", "tokens on M"):
        assert f"| {arm}" in output
    for operation in ("forward", "backward, all entries", "backward, kept entries", "top-k"):
        assert f"| {operation} | vdr_db |" in output
    assert "PoolRow(90, 16," in output


def test_no_speed_on_red(bench, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(bench, "tests_pass", lambda: False)
    monkeypatch.setattr(bench, "Run", None)
    assert bench.main([]) == 1
    assert "no speed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "is_green"),
    [("assert 1", True), ("assert 0", False), ("pytest.skip('no device')", False),
     ("time.sleep(60)", False)],
    ids=["green", "red", "skipped", "late"],
)  # fmt: skip
def test_speed_needs_tests_that_ran_and_passed(bench, monkeypatch, tmp_path, body, is_green):
    for name in ("one", "two"):
        text = f"import time, pytest\ndef test_it(): {body if name == 'two' else 'assert 1'}\n"
        (tmp_path / f"test_{name}.py").write_text(text)
    checks = [(str(tmp_path / f"test_{name}.py"), ()) for name in ("one", "two")]
    monkeypatch.setattr(bench, "CHECKS", checks)
    if "sleep" in body:
        monkeypatch.setattr(bench, "CHECK_SECONDS", 5)
    assert bench.tests_pass() is is_green


def test_says_so_without_a_device(bench, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_a_failing_arm_keeps_what_was_measured(bench, monkeypatch):
    class Arms:
        @staticmethod
        def arms(given, compiled):
            for op in ("broken", "forward"):
                yield types.SimpleNamespace(op=op, backend="vdr_db", needs_bytes=0)

    run = object.__new__(bench.Run)
    run.options = types.SimpleNamespace(dry_run=True)
    run.torch, run.device, run.dtype = torch, torch.device("cpu"), torch.float16
    run.rows, run.skipped, run.failed = [], [], []
    monkeypatch.setitem(sys.modules, "rivals", types.ModuleType("rivals"))
    Arms.Inputs = lambda *arguments: None
    monkeypatch.setitem(sys.modules, "kernel_cases", Arms)

    def time_arm(self, arm, case):
        if arm.op == "broken":
            raise RuntimeError("PTXAS error\nand more")
        self.rows.append(arm.op)

    monkeypatch.setattr(bench.Run, "time_arm", time_arm)
    run.measure("B=1", is_compiled=False)
    assert run.rows == ["forward"]
    assert run.failed == ["broken, vdr_db, B=1: RuntimeError PTXAS error"]


def test_the_report_judges_the_bars(bench):
    shape = bench.BARS[0][1]
    facts = dict.fromkeys(("dtype", "device", "torch", "triton", "commit", "date"), "x")
    common = {"shape": shape, "p20": 1.0, "p80": 2.0, "of_mm": 0.9, "launched": "graph", **facts}
    rows = [
        bench.Row(op="same-shape product", backend="torch.mm", metric="time", unit="ms",
                  median=1.0, tflops=768.0, **common),
        bench.Row(op="forward", backend="vdr_db", metric="time", unit="ms", median=1.2,
                  tflops=640.0, **common),
        bench.Row(op="forward", backend="vdr_db", metric="memory", unit="MB", median=7.8,
                  tflops=0.0, **common),
    ]  # fmt: skip
    text = bench.markdown(rows, ["a note"], ["an arm: memory"], facts)
    assert "| forward | vdr_db | 1.2 (1 to 2) | 640 | 83% | 7.8 |" in text
    assert f"| forward, time | {shape} | 1.3 | 1.08 | 1.2 | met |" in text
    assert f"| forward, time | {bench.BARS[1][1]} | 12.8 | 10.8 |  | not measured |" in text
    assert "- a note" in text
    assert "- an arm: memory" in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
def test_sparton_is_the_published_file_or_nothing(bench):
    rivals = pytest.importorskip("rivals", reason="triton is not installed")
    weight = torch.ones(20, 16)
    head = rivals.sparton_head(weight)
    if importlib.util.find_spec("xpmir") is None:
        assert head is None
        return
    assert type(head).__name__ == "SpartonHead"
    assert torch.equal(head.weight, weight)
    assert not head.bias.any()
    assert rivals.sparton_name().startswith("Sparton (experimaestro-ir 1.")


@pytest.mark.slow
def test_the_sanitizer_gets_every_kernel(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "sanitize.py"
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "--dry-run"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "every kernel ran" in finished.stdout
    plain = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PATH": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert plain.returncode == 2
    assert "compute-sanitizer is missing" in plain.stderr
