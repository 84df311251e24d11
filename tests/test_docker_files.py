"""The container files say what they must: pinned, loopback only, authenticated, watched.

What only a Docker engine proves: that the images build and the servers start.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "docker"
COMPOSE = FOLDER / "compose.yaml"
SERVICES = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
SECRETS = {"QDRANT_API_KEY": "key-for-a-test", "ELASTIC_PASSWORD": "password-for-a-test"}


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned_to_a_full_version(name):
    assert re.search(r":v?\d+\.\d+\.\d+(@sha256:[0-9a-f]{64})?$", SERVICES[name]["image"])


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_loopback_only(name):
    assert SERVICES[name]["ports"]
    for port in SERVICES[name]["ports"]:
        assert isinstance(port, str), "the short form, so that the address is plain to see"
        assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z_]+:-\d+\}:\d+", port)
    assert "network_mode" not in SERVICES[name]


def test_both_servers_ask_for_credentials_that_have_no_default():
    environment = {name: service["environment"] for name, service in SERVICES.items()}
    wanted = {
        ("qdrant", "QDRANT__SERVICE__API_KEY"): "QDRANT_API_KEY",
        ("elasticsearch", "ELASTIC_PASSWORD"): "ELASTIC_PASSWORD",
    }
    for (name, variable), source in wanted.items():
        assert re.fullmatch(rf"\$\{{{source}:\?[^}}]+\}}", environment[name][variable])
    assert environment["elasticsearch"]["xpack.security.enabled"] == "true"


@pytest.mark.parametrize("name", SERVICES)
def test_servers_have_health_checks_and_keep_their_data(name):
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] in {"CMD", "CMD-SHELL"}
    assert {"interval", "timeout", "retries"} <= set(check)
    assert SERVICES[name]["volumes"]
    # A password in an argument would show in the container's process list.
    assert "-u elastic" not in " ".join(check["test"])


def test_the_images_are_those_of_the_container_tests():
    import services

    assert SERVICES["qdrant"]["image"] == services.QDRANT_IMAGE
    assert SERVICES["elasticsearch"]["image"] == services.ELASTICSEARCH_IMAGE


def test_the_cluster_has_three_nodes_of_the_same_image_on_loopback():
    import services

    nodes = yaml.safe_load((FOLDER / "compose.cluster.yaml").read_text(encoding="utf-8"))[
        "services"
    ]
    assert len(nodes) == 3
    ports = [port for node in nodes.values() for port in node["ports"]]
    assert len({port.split(":-")[1] for port in ports}) == 6
    assert all(port.startswith("127.0.0.1:${") for port in ports)
    for node in nodes.values():
        assert node["image"] == services.QDRANT_IMAGE
        assert node["environment"]["QDRANT__CLUSTER__ENABLED"] == "true"
        assert node["environment"]["QDRANT__SERVICE__API_KEY"].startswith("${QDRANT_API_KEY:?")
    script = (FOLDER / "kill_nodes.py").read_text(encoding="utf-8")
    assert all(f'"{name}"' in script for name in list(nodes)[1:])


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_dockerfiles_copy_what_exists_and_run_without_root(name):
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    copied = [
        part
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for part in line.split()[1:-1]
    ]
    assert copied
    allowed = (FOLDER / f"{name}.dockerignore").read_text(encoding="utf-8").splitlines()
    for path in copied:
        assert (FOLDER.parent / path).exists(), path
        assert f"!{path}" in allowed
    arguments = (line[4:].split("=", 1) for line in lines if line.startswith("ARG "))
    defaults = {f"${{{name}}}": value for name, value in arguments}
    images = [line.split()[1] for line in lines if line.startswith("FROM ")]
    images = [defaults.get(image, image) for image in images]
    assert all(re.search(r":\d+\.\d+[\w.-]*$", image) for image in images)
    assert any(re.fullmatch(r"USER (?!root)\w+", line) for line in lines)


def compose_command() -> list[str] | None:
    """The compose tool that is installed, if one is; it needs no engine to check a file."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) is None:
            continue
        found = subprocess.run([*command, "version"], capture_output=True, timeout=30, check=False)
        if found.returncode == 0:
            return command
    return None


def run_config(
    command: list[str], file: Path, secrets: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in SECRETS}
    return subprocess.run(
        [*command, "-f", str(file), "config"],
        env={**kept, **secrets},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "needed"),
    [("compose.yaml", SECRETS), ("compose.cluster.yaml", {"QDRANT_API_KEY": "key-for-a-test"})],
)
def test_the_compose_tool_accepts_the_files_and_insists_on_the_secrets(tmp_path, name, needed):
    command = compose_command()
    if command is None:
        pytest.skip("neither `docker compose` nor `docker-compose` is installed")
    file = FOLDER / name
    if command == ["docker-compose"]:
        # The first generation of the tool does not know the project's name as a key of the file.
        text = file.read_text(encoding="utf-8")
        file = tmp_path / name
        file.write_text(re.sub(r"(?m)^name: [a-z-]+$", "", text), encoding="utf-8")
    accepted = run_config(command, file, needed)
    assert accepted.returncode == 0, accepted.stderr
    assert "key-for-a-test" in accepted.stdout
    shown = yaml.safe_load(accepted.stdout)["services"]
    assert set(shown) == set(yaml.safe_load(file.read_text(encoding="utf-8"))["services"])
    for missing in needed:
        rest = {name: value for name, value in needed.items() if name != missing}
        refused = run_config(command, file, rest)
        assert refused.returncode != 0
        assert missing in refused.stderr
