"""`vdr-db export`: a model folder that runs without torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from vdr_db.cli.exits import DONE
from vdr_db.cli.show import say, show_json, show_text

__all__ = ["add_arguments", "run_command"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `export`."""
    parser.add_argument("model", metavar="MODEL", help="folder, or name on the hub")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="write it there")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the saved weights (default: float32; half precision rounds them)",
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")


def run_command(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db export`."""
    from vdr_db.encoders.export import export

    say(f"exporting {arguments.model}")
    out = arguments.out
    export(arguments.model, out, dtype=arguments.dtype, revision=arguments.revision)
    written = sorted(path for path in out.rglob("*") if path.is_file())
    facts = {str(path.relative_to(out)): path.stat().st_size for path in written}
    if arguments.json:
        show_json({"folder": str(out), "files": facts})
    else:
        graphs = [name for name in facts if name.endswith(".onnx")]
        show_text(f"{out}: {sum(facts.values()) / 1e6:.1f} MB, graphs {', '.join(graphs)}")
    return DONE
