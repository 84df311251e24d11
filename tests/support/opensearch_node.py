"""A real OpenSearch of one node, from jars of Maven Central: no container and no installation.

The jars (47 MB) come once, are compared with `docker/opensearch/jars.sha256` and stay in the cache
folder of the library (`$VDR_DB_CACHE`, else `~/.cache/vdr-db`). Where from is Maven's business:
its settings, not ours, know of mirrors.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VERSION = "2.19.6"
SOURCES = Path(__file__).parents[2] / "docker" / "opensearch"
_COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.7.1:copy-dependencies"
# A small heap, and no more compilation than a short life repays.
_JAVA = (
    *("-Xms256m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
    *("-Dlog4j2.disable.jmx=true", "-Dio.netty.noUnsafe=true", "-Dfile.encoding=UTF-8"),
)
_START_S = 240.0
# Nodes that other processes still use: a process object that is collected would complain.
_LEFT_RUNNING: list[OpenSearchNode] = []


def why_missing() -> str | None:
    """Why no node can run here, or `None` when one can."""
    missing = [name for name in ("mvn", "javac", "java") if shutil.which(name) is None]
    if missing:
        return f"no OpenSearch without {', '.join(missing)}: install Maven and a JDK of 17 or newer"
    if importlib.util.find_spec("opensearchpy") is None:
        return "no OpenSearch without its client: pip install opensearch-py"
    return None


def cache_folder() -> Path:
    return Path(os.environ.get("VDR_DB_CACHE") or Path.home() / ".cache" / "vdr-db")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, on this machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def wrong_jars(folder: Path, pinned: Path = SOURCES / "jars.sha256") -> list[str]:
    """Names of jars that are missing, not expected, or of another content than pinned."""
    lines = (line.split() for line in pinned.read_text().splitlines())
    expected = {name: digest for digest, name in lines}
    found = {jar.name: hashlib.sha256(jar.read_bytes()).hexdigest() for jar in folder.glob("*.jar")}
    return sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))


def program() -> Path:
    """The folder of jars (`lib`) and of our class (`classes`), made when it is not there yet."""
    sources = [SOURCES / name for name in ("pom.xml", "jars.sha256", "OpenSearchNode.java")]
    sources.append(SOURCES / "log4j2.xml")
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    target = cache_folder() / f"opensearch-{VERSION}-{key}"
    with locked(cache_folder() / "opensearch.lock"):
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="opensearch-") as work:
            made = Path(work) / "made"
            lib, classes = made / "lib", made / "classes"
            classes.mkdir(parents=True)
            maven = ["mvn", "-B", "-q", "-f", str(sources[0]), _COPY, f"-DoutputDirectory={lib}"]
            subprocess.run(maven, check=True, timeout=900)
            wrong = wrong_jars(lib)
            assert not wrong, f"these jars are not those of jars.sha256: {wrong}"
            javac = ["javac", "-nowarn", "-cp", f"{lib}/*", "-d", str(classes), str(sources[2])]
            subprocess.run(javac, check=True, timeout=300)
            shutil.copy(sources[3], classes)
            made.rename(target)
    return target


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class OpenSearchNode:
    """A node on the loopback interface; it ends with the process `owner`, if not before.

    Args:
        home: Keeps data and log; a second node there recovers what the first one wrote.
        owner: Id of a process.
        port: Where it answers; a free one without.
        settings: Settings of OpenSearch, as `http.max_content_length="1mb"`.
    """

    def __init__(
        self, home: Path, owner: int, *, port: int | None = None, **settings: object
    ) -> None:
        self.port = free_port() if port is None else port
        folder = program()
        given = {
            "network.host": "127.0.0.1",
            "http.port": self.port,
            "transport.port": free_port(),
            **settings,
        }
        home.mkdir(parents=True, exist_ok=True)
        self.log = home / "node.log"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [
                    *("java", *_JAVA, "-cp", f"{folder}/lib/*:{folder}/classes"),
                    *("OpenSearchNode", str(home), str(owner)),
                    *(f"{name}={value}" for name, value in given.items()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """Ends it at once, as a loss of power would."""
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()

    def _wait(self) -> None:
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            if is_ready(self.port):
                return
            time.sleep(0.2)
        self.process.kill()
        raise AssertionError(f"OpenSearch did not start: {self.log.read_text(errors='replace')}")


def is_ready(port: int) -> bool:
    """Whether a node answers there, and has recovered what it keeps."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/_cluster/health")
        answer = connection.getresponse()
        return answer.status == 200 and json.loads(answer.read())["status"] != "red"
    except (OSError, http.client.HTTPException, ValueError):
        return False
    finally:
        connection.close()


@contextmanager
def shared_node(folder: Path, owner: int) -> Iterator[str]:
    """The address of the one node of all test processes with that folder and owner.

    Whoever comes first starts it. It ends with the owner; an owner that runs the tests itself stops
    it before.
    """
    state = folder / "opensearch.json"
    node = None
    with locked(folder / "opensearch.lock"):
        port = json.loads(state.read_text())["port"] if state.exists() else None
        if port is None or not is_ready(port):
            node = OpenSearchNode(folder / "opensearch", owner)
            port = node.port
            state.write_text(json.dumps({"port": port}))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        if node is not None and owner == os.getpid():
            node.stop()
        elif node is not None:
            _LEFT_RUNNING.append(node)
