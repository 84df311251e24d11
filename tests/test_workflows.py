"""Workflows, hooks and releases agree with the project, and actionlint with the workflows."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import services
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / ".github" / "workflows"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
TESTS = yaml.safe_load((WORKFLOWS / "test.yml").read_text("utf-8"))


def test_actionlint_finds_nothing():
    own = Path(sys.prefix, "bin", "actionlint")
    found = str(own) if own.exists() else shutil.which("actionlint")
    if found is None:
        pytest.skip("actionlint is not installed; `make workflows` builds it where Go is")
    command = [found, "-no-color", *map(str, WORKFLOWS.glob("*.yml"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_supported_python_is_tested():
    matrix = TESTS["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"]
    floor = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert matrix["include"] == [{"python": floor, "packages": "floor"}]


def test_servers_are_those_of_the_tests():
    job = TESTS["jobs"]["servers"]
    images = {name: service["image"] for name, service in job["services"].items()}
    assert images["qdrant"] == services.QDRANT_IMAGE
    assert images["elasticsearch"] == services.ELASTICSEARCH_IMAGE
    pom = (ROOT / "docker" / "opensearch" / "pom.xml").read_text("utf-8")
    assert images["opensearch"].rpartition(":")[2] in pom
    assert job["env"]["VDR_TEST_REQUIRE_SERVICES"] == "1"
    assert {name for name in job["env"] if name.endswith("_URL")} == {
        "VDR_TEST_QDRANT_URL", "VDR_TEST_ES_URL", "VDR_TEST_OPENSEARCH_URL",
    }  # fmt: skip


def test_hooks_run_the_versions_of_make_check():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"][0][
        "hooks"
    ]
    pinned = next(one for one in PROJECT["dependency-groups"]["lint"] if one.startswith("ruff=="))
    used = [one["additional_dependencies"] for one in hooks if one["id"].startswith("ruff")]
    assert used == [[pinned], [pinned]]
    (module,) = next(one for one in hooks if one["id"] == "actionlint")["additional_dependencies"]
    assert f"ACTIONLINT = {module}\n" in (ROOT / "Makefile").read_text("utf-8")


def release_problems(tag, project, changelog):
    spec = importlib.util.spec_from_file_location("check", ROOT / "scripts" / "check_release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.problems(tag, project, changelog)


READY = '[project]\nversion = "1.2.3"\n[project.urls]\nSource = "https://example.org/vdr-db"\n'
CHANGES = "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-31\n\n### Added\n\n- A thing.\n"


def test_a_release_that_is_ready_goes_out():
    assert release_problems("v1.2.3", READY, CHANGES) == []


@pytest.mark.parametrize(
    ("tag", "project", "changelog", "told"),
    [
        ("v1.2.4", READY, CHANGES, "the tag must be v1.2.3"),
        ("v1.2.3", READY, CHANGES.replace("1.2.3", "1.2.2"), "a section `## \\[1.2.3\\] - YYYY"),
        ("v1.2.3", READY, CHANGES.replace("ed]\n", "ed]\n\n- More.\n", 1), "under Unreleased"),
        ("v1.2.3", READY.replace("example.org", "x.example"), CHANGES, "stands for one to come"),
    ],
)
def test_a_release_that_is_not_ready_is_refused(tag, project, changelog, told):
    (found,) = release_problems(tag, project, changelog)
    assert told.replace("\\", "") in found


def test_nothing_goes_out_with_a_known_advisory():
    jobs = yaml.safe_load((WORKFLOWS / "release.yml").read_text("utf-8"))["jobs"]
    assert jobs["audit"]["strategy"]["matrix"]["resolution"] == ["lowest-direct", "highest"]
    script = jobs["audit"]["steps"][-1]["run"].replace("\\\n", " ")
    compiled, audited = script.strip().splitlines()[1:]
    assert compiled.startswith("uv pip compile ")
    assert "--extra all " in compiled
    assert audited.startswith("pip-audit --requirement pinned.txt ")
    assert set(jobs["publish"]["needs"]) == {"build", "audit"}
    assert "all" in PROJECT["project"]["optional-dependencies"]


def test_versions_agree():
    import vdr_db

    assert PROJECT["project"]["version"] == vdr_db.__version__
