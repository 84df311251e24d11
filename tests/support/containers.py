"""Containers for tests: a Docker engine that answers, else podman's service, and one image.

The image of OpenSearch is a Debian with a Java runtime and the jars of `opensearch_node`. It stays
in the engine and is built once. Where no base image can be fetched, debootstrap makes one, from
`$DEBIAN_MIRROR` if that is set; other settings of registries are those of the machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import opensearch_node
import services

# One base for both images: to make it takes longer than to build on it.
_BASE = "localhost/vdr-db-debian:bookworm"
_PACKAGES = "openjdk-17-jre-headless,ca-certificates,python3,python3-pip,python-is-python3"
_PIP = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT")
# The machine may be a container itself: no systemd, and few file descriptors by default.
_PODMAN = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=20000:20000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
"""


@dataclass(frozen=True)
class Containers:
    """An engine for containers.

    Attributes:
        tool: Its command, `docker` or `podman`.
        environment: What that command and testcontainers need to find it.
    """

    tool: str
    environment: dict[str, str]

    def run(self, *arguments: str, check: bool = True) -> bool:
        """Runs the engine's command; whether it succeeded."""
        done = self._done(arguments)
        assert done.returncode == 0 or not check, f"{self.tool} {arguments}: {done.stderr[-2000:]}"
        return done.returncode == 0

    def output(self, *arguments: str) -> str:
        """What the engine's command writes when it succeeds."""
        done = self._done(arguments)
        assert done.returncode == 0, f"{self.tool} {arguments}: {done.stderr[-2000:]}"
        return done.stdout

    def _done(self, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.tool, *arguments],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=1800,
        )

    def opensearch_image(self) -> str:
        """The image of a node, built if it is not there."""
        context = opensearch_node.program()
        image = f"localhost/vdr-db-{context.name}:{opensearch_node.VERSION}"
        if not self.run("image", "inspect", image, check=False):
            base = [] if self.tool == "docker" else [f"--build-arg=BASE={self._base()}"]
            file = f"--file={opensearch_node.SOURCES / 'Dockerfile'}"
            self.run("build", "--network=none", *base, "--tag", image, file, str(context))
        return image

    def check_ports(self, image: str) -> None:
        """Skips where the engine publishes no port, as podman without iptables, and says why."""
        done = self._done(("run", "--rm", "--publish=127.0.0.1::9200", "--entrypoint=true", image))
        if done.returncode != 0:
            services.skip(f"{self.tool} publishes no port here: {done.stderr.strip()[-500:]}")

    def library_image(self, image: str, *arguments: str) -> str:
        """Builds `docker/Dockerfile` under that name; returns the image that it is based on.

        Settings of pip come from the environment. `arguments` are more build arguments.
        """
        base = "python:3.12-slim-bookworm" if self.tool == "docker" else self._base()
        given = {name: os.environ[name] for name in _PIP if os.environ.get(name)}
        options = [f"--build-arg={one}" for one in (f"BASE={base}", *arguments)]
        options += [f"--build-arg={name}={value}" for name, value in given.items()]
        if "PIP_CERT" in given and self.tool == "podman":
            options.append(f"--volume={given['PIP_CERT']}:{given['PIP_CERT']}:ro")
        root = opensearch_node.SOURCES.parents[1]
        dockerfile = str(root / "docker" / "Dockerfile")
        self.run("build", "--network=host", *options, "--tag", image, "-f", dockerfile, str(root))
        return base

    def image_bytes(self, image: str) -> int:
        """Size of all layers of an image."""
        return int(self.output("image", "inspect", "--format", "{{.Size}}", image))

    def _base(self) -> str:
        if not self.run("image", "inspect", _BASE, check=False):
            if shutil.which("debootstrap") is None:
                services.skip("no base image for podman: debootstrap is not installed")
            with tempfile.TemporaryDirectory() as folder:
                root, archive = Path(folder) / "root", Path(folder) / "root.tar"
                mirror = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
                include = f"--include={_PACKAGES}"
                make = ["debootstrap", "--variant=minbase", include, "bookworm", str(root), mirror]
                # A root that a crash may take need not reach the disk package by package.
                quick = {**os.environ, "DPKG_FORCE": "unsafe-io"}
                silent = subprocess.DEVNULL
                subprocess.run(make, check=True, timeout=900, stdout=silent, env=quick)
                archived = ["--exclude=*.deb", "-C", str(root), "-cf", str(archive), "."]
                subprocess.run(["tar", *archived], check=True)
                self.run("import", str(archive), _BASE)
        return _BASE


@contextmanager
def container_engine(folder: Path) -> Iterator[Containers]:
    """A Docker engine that answers, else podman's service while the block runs; else a skip."""
    if services.docker_answers():
        yield Containers("docker", {})
        return
    if shutil.which("podman") is None or shutil.which("runc") is None or os.getuid() != 0:
        services.skip("no Docker engine answers, and there are no podman and runc to run as root")
    settings, socket = folder / "containers.conf", folder / "podman.sock"
    settings.write_text(_PODMAN)
    environment = {
        "CONTAINERS_CONF": str(settings),
        "DOCKER_HOST": f"unix://{socket}",
        "TESTCONTAINERS_RYUK_DISABLED": "true",
        "TESTCONTAINERS_CONNECTION_MODE": "docker_host",
        "TESTCONTAINERS_HOST_OVERRIDE": "127.0.0.1",
    }
    service = subprocess.Popen(
        ["podman", "system", "service", "--time=0", f"unix://{socket}"],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 60
        while not socket.exists() and time.monotonic() < end and service.poll() is None:
            time.sleep(0.1)
        if not socket.exists():
            services.skip("podman's service does not start here")
        yield Containers("podman", environment)
    finally:
        service.terminate()
        service.wait(30)
