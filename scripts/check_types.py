"""Runs mypy over the installed library and refuses when it saw fewer files than there are.

`kernels/` and `connectors/` are packages of the library by `package-dir`, so mypy must be run from
outside of the repository root, where the folder `vdr_db/` alone would hide them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Exit code of mypy, or 1 when files are missing from its count."""
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), "-p", "vdr_db"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    sys.stdout.write(done.stdout + done.stderr)
    if done.returncode != 0:
        return done.returncode
    sources = [
        path
        for folder in ("vdr_db", "kernels", "connectors")
        for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    seen = int(re.search(r"in (\d+) source file", done.stdout).group(1))  # type: ignore[union-attr]
    if seen < len(sources):  # folders of data may count as packages of their own
        sys.stdout.write(
            f"mypy saw {seen} files of {len(sources)}; reinstall the library: "
            "pip install -e . --config-settings editable_mode=strict\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
