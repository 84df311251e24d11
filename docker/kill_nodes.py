"""Kills and starts nodes of `compose.cluster.yaml`, one at a time, until it is stopped.

    python docker/kill_nodes.py [--rounds 10] [--down 5] [--up 20] [--seed 0]

Run tests or an ingest against the other nodes meanwhile: with two copies of each shard nothing may
be lost and nothing answered short.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

COMPOSE = ("docker", "compose", "-f", str(Path(__file__).with_name("compose.cluster.yaml")))
NODES = ("node-2", "node-3")  # clients speak to the first


def main() -> None:
    """Kills with SIGKILL, waits, starts again, and waits until the node is healthy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--down", type=float, default=5.0, help="seconds a node stays away")
    parser.add_argument("--up", type=float, default=20.0, help="seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    for turn in range(arguments.rounds):
        node = chance.choice(NODES)
        sys.stderr.write(f"round {turn + 1}: {node} is killed\n")
        subprocess.run([*COMPOSE, "kill", "--signal", "KILL", node], check=True)
        time.sleep(chance.uniform(0.5, 1.5) * arguments.down)
        subprocess.run([*COMPOSE, "up", "--detach", "--wait", node], check=True)
        time.sleep(chance.uniform(0.5, 1.5) * arguments.up)


if __name__ == "__main__":
    main()
