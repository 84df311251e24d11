"""Every shipped kernel configuration compiles within the limits of its device, without a GPU."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import requires, version
from pathlib import Path

import pytest

from vdr_db.kernels.dispatch import OLDEST_TRITON

ROOT = Path(__file__).parents[2]
GATE = ROOT / "benchmarks" / "compile_gate.py"


@pytest.fixture
def gate(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(GATE.parent))
    specification = importlib.util.spec_from_file_location("compile_gate", GATE)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "compile_gate", module)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_touched_configuration_passes_the_gate(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", str(GATE), "--check", "--touched"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    assert f"0 faults, Triton {version('triton')}" in finished.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_table_that_the_compiler_did_not_make_is_found(gate, monkeypatch, tmp_path, capsys):
    specs = [spec for spec in gate.all_specs(80) if spec.kernel == "mark_lexical_kernel"]
    triton = importlib.import_module("triton").__version__
    rows = [row for row in gate.read_table(80) if row["source"] == gate.digest(specs[0])]
    rows = [row for row in rows if row["triton"] == triton]
    if not rows:
        pytest.skip(f"no table of Triton {triton}")
    (row,) = rows
    monkeypatch.setattr(gate, "all_specs", lambda sm: specs)
    monkeypatch.setattr(gate, "RESULTS", tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gate, "ProcessPoolExecutor", lambda count, _: ThreadPoolExecutor(count))
    for change, code in (({}, 0), ({"registers": "13"}, 1)):
        gate.write_table(80, [gate.resources({**row, **change})])
        assert gate.main(["--sm", "80", "--touched", "--processes", "1"]) == code
    assert "not what the stored table says" in capsys.readouterr().out


def test_versions_are_the_oldest_that_of_torch_and_those_of_the_makefile(gate):
    makefile = (ROOT / "Makefile").read_text()
    assert f"TRITONS = {' '.join(gate.VERSIONS)}\n" in makefile
    assert tuple(map(int, gate.VERSIONS[0].split(".")[:2])) == OLDEST_TRITON
    # builds of torch for the processor alone ask for none
    asked = re.findall(r"triton==([\d.]+)", " ".join(requires("torch") or ()))
    if asked and f"torch=={version('torch').split('+')[0]}\n" in makefile:
        assert gate.VERSIONS[1] in asked


@pytest.mark.parametrize("triton", ["3.4.0", "3.7.1", "3.9.0"])
@pytest.mark.parametrize(
    ("sm", "shared_limit"),
    [(80, 163 * 1024), (86, 99 * 1024), (89, 99 * 1024), (90, 227 * 1024), (100, 227 * 1024),
     (120, 99 * 1024)],
)  # fmt: skip
def test_the_stored_table_is_fresh_and_holds_the_limits(gate, sm, shared_limit, triton):
    assert triton in gate.VERSIONS
    rows = [row for row in gate.read_table(sm) if row["triton"] == triton]
    gluon = "pool_persistent_kernel"  # which the oldest Triton does not have
    assert any(row["kernel"] == gluon for row in rows) == (sm == 90 and triton != "3.4.0")
    has_gluon = importlib.import_module("kernel_specs").HAS_GLUON
    hidden = "" if has_gluon and triton != "3.4.0" else gluon
    specs = [spec for spec in gate.all_specs(sm) if spec.kernel != hidden]
    assert {row["source"] for row in rows if row["kernel"] != hidden} == set(
        map(gate.digest, specs)
    )
    assert len(specs) > 50
    for row in rows:
        assert int(row["spills"]) == int(row["stack_bytes"]) == int(row["serialised"]) == 0, row
        is_forward = row["kernel"].startswith("pool_") and row["label"][:4] in ("bf16", "fp16")
        assert int(row["registers"]) <= (200 if is_forward else 255), row
        assert int(row["shared_bytes"]) <= shared_limit, row


def test_placement_and_onehot_tiles_take_few_instructions(gate):
    with (ROOT / "benchmarks" / "results" / "backward_sm90.csv").open(newline="") as file:
        assert "a model, never measured" in file.readline()
        rows = list(csv.DictReader(file))
    counted = importlib.import_module("count_backward").specs()
    assert {row["digest"] for row in rows} == {"", *map(gate.digest, counted)}
    placed = [row for row in rows if row["kernel"] == "place_entries_kernel"]
    here = [row for row in placed if row["source"] == "here"]
    before = [row for row in placed if row["source"] == "558bc49"]
    assert len(here) == len(before) == 2
    for row in here:
        assert row["entries"] == "512"
        assert int(row["instructions"]) <= 800
        assert all(
            float(row["cycles_per_entry"]) < float(old["cycles_per_entry"]) / 5 for old in before
        )
    cycles = {
        (row["kernel"], row["label"]): float(row["cycles_per_entry"])
        for row in rows
        if row["source"] == "here"
    }
    assert cycles["onehot_kernel", "bf16 128x128x32 tokens=0"] < cycles[
        "weight_gather_kernel", "bf16"]  # fmt: skip
    assert cycles["onehot_kernel", "bf16 128x128x32 tokens=1"] < cycles[
        "sum_lists_kernel", "bf16 tokens kept=0"]  # fmt: skip


def test_loops_and_all_instructions_are_counted(gate):
    count_backward = importlib.import_module("count_backward")
    assert count_backward.instructions_of(LOOP) == (12, 10)
    assert count_backward.instructions_of("/*0000*/ EXIT ;") == (1, 0)


def test_a_table_takes_the_place_of_the_one_of_its_version(gate, monkeypatch, tmp_path):
    stored = gate.resources(gate.read_table(90)[0])
    monkeypatch.setattr(gate, "RESULTS", tmp_path)
    monkeypatch.setattr(gate, "VERSIONS", ("3.4.0", "3.7.1"))
    for triton, registers in (("3.9.0", 1), ("3.7.1", 2), ("3.4.0", 3), ("3.7.1", 4)):
        row = dataclasses.replace(stored, triton=triton, registers=registers)
        gate.write_table(90, [row, row])
    rows = [(row["triton"], row["registers"]) for row in gate.read_table(90)]
    assert rows == [("3.4.0", "3"), ("3.4.0", "3"), ("3.7.1", "4"), ("3.7.1", "4")]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spills": 1}, "spill"),
        ({"stack_bytes": 8}, "stack"),
        ({"registers": 201}, "registers"),
        ({"shared_bytes": 227 * 1024 + 1}, "shared memory"),
        ({"wgmma": 0}, "warpgroup"),
        ({"tma": 0}, "bulk tensor"),
        ({"serialised": 1}, "serialised"),
    ],
)
def test_each_fault_is_found(gate, change, fault):
    spec = next(iter(gate.all_specs(90)))
    row = gate.Resources("3.9.0", spec.kernel, spec.label, 8, 4, 200, 0, 0, 100_000, 8, 0, 8, 0, "")
    assert gate.faults(90, spec, row) == []
    found = gate.faults(90, spec, dataclasses.replace(row, **change))
    assert len(found) == 1
    assert fault in found[0]
    other = dataclasses.replace(spec, label="fp32")  # its limit is that of the machine
    for registers in (255, 256):
        found = gate.faults(90, other, dataclasses.replace(row, registers=registers))
        assert len(found) == registers - 255


def test_each_regression_is_found(gate):
    stored = [row for row in gate.read_table(90) if row["triton"] == gate.VERSIONS[1]]
    rows = [gate.resources(row) for row in stored]
    assert gate.regressions(stored, rows) == []
    more = dataclasses.replace(rows[0], registers=rows[0].registers + 9, shared_bytes=230_000)
    assert len(gate.regressions(stored, [more, *rows[1:]])) == 2
    assert len(gate.regressions(stored, rows[1:])) == 1
    assert len(gate.regressions(stored[1:], rows)) == 1


LOOP = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_4:
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/                   IADD3 R0, R0, 0x40, RZ ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   FMNMX.NAN R3, R24, R25, !PT ;
        /*0070*/              @!P2 FSEL R4, R24, -INF , P0 ;
        /*0080*/                   FFMA R5, R24, R6, R7 ;
.L_x_2:
        /*0090*/                   ISETP.GE.AND P3, PT, R0, UR7, PT ;
        /*00a0*/              @!P3 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*00d0*/               @P0 BRA `(.L_x_4) ;
        /*00e0*/                   BRA `(.L_x_1) ;
"""


def test_instructions_of_a_step_and_of_an_epilogue_are_told_apart(gate):
    count_alu = importlib.import_module("count_alu")
    step, with_epilogue = count_alu.turns(LOOP)
    assert step == (2, 7)
    assert with_epilogue == (4, 10)
    with pytest.raises(RuntimeError, match="no loop"):
        count_alu.turns(LOOP.replace("HGMMA", "HMMA"))


def test_more_work_is_a_fault(gate):
    count_alu = importlib.import_module("count_alu")
    with count_alu.PATH.open(newline="") as file:
        assert "a model, never measured" in file.readline()
        rows = list(csv.DictReader(file))
    stored = [count_alu.stored_counts(row) for row in rows]
    assert count_alu.grown(stored) == []
    more = [dataclasses.replace(row, epilogue_alu=row.epilogue_alu + 1) for row in stored]
    assert len(count_alu.grown(more)) == len(stored)
    before, now = (
        {row.argmax: row.epilogue_alu for row in stored if row.source == source}
        for source in ("558bc49", "here")
    )
    assert now[0] <= 0.6 * before[0]
    assert now[1] <= 0.7 * before[1]
    assert all(row.registers <= 200 for row in stored if row.source == "here")
