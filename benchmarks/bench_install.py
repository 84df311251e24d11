"""What an install costs: size and processor time of a fresh environment for each extra.

    python benchmarks/bench_install.py --out benchmarks/results/install.csv

Each extra is installed from a wheel of this checkout into an environment of its own, without pip's
cache of built packages being emptied first; downloads are not counted, since only processor time
is. The size is that of the environment, pip included (about 20 MB).
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from measure import rows_of, write_csv

ROOT = Path(__file__).parents[1]
EXTRAS = (
    *("", "qdrant", "elasticsearch", "opensearch", "cli", "serve", "images", "parquet"),
    *("openvino", "torch"),
)


def folder_mb(folder: Path) -> float:
    """Bytes of all files below a folder, in MB (1e6 bytes)."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files) / 1e6


def measured(wheel: Path, extra: str) -> tuple[float, float]:
    """Size in MB and processor time in seconds of one install."""
    with tempfile.TemporaryDirectory(prefix="vdr-db-install-") as home:
        venv.create(home, with_pip=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        wanted = f"{wheel}[{extra}]" if extra else str(wheel)
        pip = [f"{home}/bin/python", "-m", "pip", "install", "--quiet", "--no-compile", wanted]
        subprocess.run(pip, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return folder_mb(Path(home)), seconds


def built(folder: Path) -> Path:
    """A wheel of this checkout; of a copy, since setuptools would pack what lies in `build/`."""
    source = folder / "source"
    source.mkdir()
    for name in ("vdr_db", "kernels", "connectors"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder)]
    subprocess.run([*pip, str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def main() -> None:
    """Measures and prints, or writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--extras", nargs="*", default=EXTRAS)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="vdr-db-wheel-") as folder:
        wheel = built(Path(folder))
        for extra in arguments.extras:
            size, seconds = measured(wheel, extra)
            name = extra or "none"
            sys.stdout.write(f"{name:<14} {size:7.0f} MB {seconds:6.1f} s\n")
            sys.stdout.flush()
            samples = {"size (MB)": [size], "processor time (s)": [seconds]}
            rows += rows_of("install", "pip", name, "", samples)
    if arguments.out:
        write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
