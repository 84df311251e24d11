"""What is installed: one top-level name, every source file, a light import, honest extras."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import vdr_db

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"vdr_db": "vdr_db", "kernels": "vdr_db.kernels", "connectors": "vdr_db.connectors"}


def packages_on_disk() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            found[".".join([package, *parts])] = init.parent
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A copy without build leftovers: setuptools would pack stale files from `build/`.
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = ["vdr_db", "kernels", "connectors", "pyproject.toml", "README.md", "LICENSE", "NOTICE"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(target), str(source)], check=True)
    (built,) = target.glob("*.whl")
    return built


def test_listed_packages_are_those_on_disk():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == set(packages_on_disk())


def test_wheel_holds_every_source_file_under_one_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"vdr_db"}
    for package, folder in packages_on_disk().items():
        for path in folder.glob("*.py"):
            assert f"{package.replace('.', '/')}/{path.name}" in names
    for folder in ("data", "models"):
        for path in (ROOT / "vdr_db" / folder).rglob("*"):
            assert path.is_dir() or path.relative_to(ROOT).as_posix() in names
    templates = (ROOT / "vdr_db" / "serve" / "templates").iterdir()
    assert {f"vdr_db/serve/templates/{path.name}" for path in templates} <= names
    assert {"vdr_db/py.typed", "vdr_db/explain/report.css"} <= names


def test_licences_are_told_with_all_that_is_packed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        told = archive.read(metadata).decode("utf-8")
    expression = PROJECT["project"]["license"]
    assert f"License-Expression: {expression}\n" in told
    parts = {"Apache-2.0", "GPL-2.0-only", "LicenseRef-Debian-package-descriptions"}
    assert set(expression.split(" AND ")) == parts
    for file in PROJECT["project"]["license-files"]:
        assert f"License-File: {file}\n" in told
        assert any(name.endswith(f".dist-info/licenses/{file}") for name in names)
    sample = (ROOT / "vdr_db/data/debian_sample.LICENSE.md").read_text("utf-8")
    assert "GNU General Public License version 2" in sample
    assert "debian/copyright" in sample
    with tarfile.open(ROOT / "vdr_db/data/debian_sample.tar.gz") as documents:
        assert any(name.endswith("COPYING.GPL-2") for name in documents.getnames())
    # Every model with what it was made of.
    notice = (ROOT / "NOTICE").read_text("utf-8")
    models = {Path(name).parts[2] for name in names if name.startswith("vdr_db/models/vdr")}
    for model in sorted(models):
        own = notice.partition(f"vdr_db/models/{model}\n")[2].partition("\n\n")[0]
        assert "Apache License 2.0" in own
        assert "rained on " in own


NEWEST = "3.13"
"""The newest Python that is supported; tested where it is at hand."""


def interpreter(version: str) -> str | None:
    """Command of another Python, or None."""
    environment = {**os.environ, "PYENV_VERSION": version}  # what pyenv goes by, where it is there
    ask = ["-c", "import sys; print(sys.executable)"]
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run(
            [f"python{version}", *ask], capture_output=True, text=True, env=environment, check=False
        )
        return done.stdout.strip() or None
    return None


@pytest.fixture(scope="module", params=["this", NEWEST])
def bare_python(
    wheel: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """A fresh environment with what `pip install vdr-db` brings, and pytest."""
    home = tmp_path_factory.mktemp("bare")
    made_by = sys.executable if request.param == "this" else interpreter(request.param)
    if made_by is None:
        pytest.skip(f"no Python {request.param} is installed")
    subprocess.run([made_by, "-m", "venv", str(home)], check=True)
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-compile", str(wheel)], check=True)
    return python


def run(python: Path, code: str) -> str:
    done = subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CARD = (
    "from vdr_db.connectors import VDRQdrant; "
    'c = VDRQdrant("articles"); c.add_texts(["a cat sleeps", "rockets fly"]); '
    'print(c.search("kitten")[0].payload["text"])'
)


def test_the_cards_lines_work_in_the_base_install(bare_python, tmp_path):
    size = subprocess.run(
        ["du", "-sm", bare_python.parents[1]], capture_output=True, text=True, check=True
    )
    assert int(size.stdout.split()[0]) <= 360
    done = subprocess.run(
        [bare_python, "-c", CARD], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a cat sleeps\n"
    found = run(bare_python, "import importlib.util as u; print(u.find_spec('torch'))")
    assert found == "None\n"


def test_the_command_line_works_in_the_base_install(bare_python, tmp_path):
    (tmp_path / "notes.jsonl").write_text('{"id": "a", "text": "a cat sleeps"}\n', "utf-8")

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [bare_python.parent / "vdr-db", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    command("index", "notes.jsonl", "--store", "notes.qdrant")
    assert "a cat sleeps" in command("search", "kitten", "--store", "notes.qdrant")
    assert "product" in command("explain", "kitten", "a", "--store", "notes.qdrant")
    assert "cat" in command("encode", "a cat sleeps")
    assert "1" in command("info", "--store", "notes.qdrant", "--json")


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("import vdr_db.serve", "serve"),
        ("from vdr_db.kernels import project_pool", "torch"),
        ("from vdr_db import SparseRows; SparseRows.empty(1, 1).to_scipy()", "bench"),
        ("from vdr_db.encoders.export import export; export('vdr-mini', 'x')", "export"),
    ],
)
def test_missing_extras_are_named(bare_python, code, extra):
    done = subprocess.run(
        [bare_python, "-I", "-c", code], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode != 0
    assert "MissingExtraError" in done.stderr
    assert f"pip install 'vdr-db[{extra}]'" in done.stderr


WITHOUT_TORCH = [
    "tests/test_sparse.py",
    "tests/test_readers.py",
    "tests/test_errors.py",
    "tests/test_batching.py",
    "tests/ingest/test_ledger.py",
]
"""What of the tests runs in an environment that has no torch; most others compare with torch."""


@pytest.mark.slow
def test_tests_that_need_no_torch_pass_without_it(bare_python, tmp_path):
    needs = ["pytest", "pytest-timeout", "hypothesis", "scipy", "pytest-xdist"]
    pip = [bare_python, "-m", "pip", "install", "-q", "--no-compile", *needs]
    subprocess.run(pip, check=True)
    command = [bare_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest"]
    done = subprocess.run(
        [*command, "-p", "no:randomly", *(str(ROOT / file) for file in WITHOUT_TORCH)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_is_light():
    code = (
        "import sys, time; start = time.perf_counter(); import vdr_db;"
        "print((time.perf_counter() - start) * 1000);"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    runs = [run(Path(sys.executable), code).splitlines() for _ in range(3)]
    assert runs[0][1] == "[]"
    assert min(float(elapsed_ms) for elapsed_ms, _ in runs) < 100


PUBLIC_MODULES = [
    "vdr_db",
    "vdr_db.errors",
    "vdr_db.sparse",
    "vdr_db.stamp",
    "vdr_db.text.vocabulary",
]
PUBLIC_MODULES += [
    "vdr_db.kernels",
    "vdr_db.connectors",
    "vdr_db.evaluation.metrics",
    "vdr_db.readers",
]


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_public_names_exist_and_are_sorted(name):
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(set(module.__all__)), "sort `__all__`"
    for public in module.__all__:
        assert getattr(module, public) is not None


def test_version_is_written_once():
    assert PROJECT["project"]["version"] == vdr_db.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changelog or f"## [{vdr_db.__version__}]" in changelog


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vdr_db.nothing  # noqa: B018
