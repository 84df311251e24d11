"""The image of `docker/Dockerfile`: built, measured, and asked for `vdr-db demo`.

    python benchmarks/bench_image.py [--extras torch,qdrant] [--out benchmarks/results/image.csv]

Needs a Docker engine or podman (with debootstrap, which makes the base image then). What counts is
what stands above the base image. The demo runs without a network.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from measure import rows_of, write_csv

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from containers import container_engine

IMAGE = "localhost/vdr-db-measured:latest"


def main() -> None:
    """Builds, measures, runs, and prints or writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--extras", help="build argument EXTRAS; the usual ones without")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    extras = [f"EXTRAS={arguments.extras}"] if arguments.extras else []
    with (
        tempfile.TemporaryDirectory(prefix="vdr-db-image-") as folder,
        container_engine(Path(folder)) as engine,
    ):
        base = engine.library_image(IMAGE, *extras)
        above = (engine.image_bytes(IMAGE) - engine.image_bytes(base)) / 1e6
        told = engine.output("run", "--rm", "--network=none", IMAGE, "demo")
        sys.stdout.write(f"{told}\nlayers above the base: {above:.0f} MB\n")
        if "vdr-mini" not in told:
            raise SystemExit("the demo in the image told nothing of its model")
        if arguments.out:
            samples = {"layers above the base (MB)": [above]}
            rows = rows_of("image", engine.tool, arguments.extras or "usual", "", samples)
            write_csv(arguments.out, rows, append=arguments.out.exists())


if __name__ == "__main__":
    main()
