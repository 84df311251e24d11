"""The parts of the web page, and the command that serves it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vdr_db.cli.main import main
from vdr_db.errors import ConfigError, InputError
from vdr_db.explain.spans import Mark

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from vdr_db.budget import Budget  # noqa: E402
from vdr_db.explain.snippets import snippet  # noqa: E402
from vdr_db.serve import listen  # noqa: E402
from vdr_db.serve.facets import filter_of, find_facets, parse_choices  # noqa: E402

NOTES = Path(__file__).parent / "data" / "notes.jsonl"


def test_facets_are_fields_with_few_values():
    payloads = [
        {
            "text": "t",
            "year": 2000 + i % 3,
            "open": i % 2 == 0,
            "a.b": "xy"[i % 2],
            "tags": ["red", "red", "blue"][: i % 4],
            "unique": f"u{i}",
            "deep": {"deeper": {"deepest": {"out": "of reach"}}},
            'quo"te': "x",
            "score": 0.5,
        }
        for i in range(30)
    ]
    facets = {facet.key: facet for facet in find_facets(payloads, without=["text"])}
    assert set(facets) == {"year", "open", '"a.b"', "tags"}
    given = ["year:2001", "open:true", '"a.b":x', "year:2002", "year:2001"]
    choices = parse_choices(given, list(facets.values()))
    assert filter_of(choices) == {"year": [2001, 2002], "open": [True], '"a.b"': ["x"]}
    assert filter_of([]) is None
    with pytest.raises(InputError, match="KEY:VALUE"):
        parse_choices(["unique:u1"], list(facets.values()))


def test_a_snippet_shows_what_matters():
    text = "nothing here " * 60 + "the giraffe eats " + "nothing there " * 60
    at = text.index("giraffe")
    shown, inside = snippet(text, [Mark(0, 7, 0.1), Mark(at, at + 7, 2.0)])
    assert [shown[mark.start : mark.stop] for mark in inside] == ["giraffe"]
    assert shown.startswith("… ")
    assert shown.endswith(" …")
    assert len(shown) < 360
    assert snippet("short", [Mark(0, 5, 1.0)]) == ("short", [Mark(0, 5, 1.0)])
    wall = "x" * 2000
    assert len(snippet(wall, [Mark(1990, 2000, 1.0)])[0]) < 360


def test_answers_wait_for_no_acknowledgement():
    address = listen("127.0.0.1", 0)
    with address.socket, socket.create_connection(address.socket.getsockname()):
        accepted, _ = address.socket.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_impossible_addresses():
    with pytest.raises(ConfigError, match="port"):
        listen("127.0.0.1", 70000)
    with pytest.raises(ConfigError, match="cannot be listened on"):
        listen("256.256.256.256", 0)
    taken = listen("127.0.0.1", 0)
    with taken.socket, pytest.raises(ConfigError, match="--port"):
        listen("127.0.0.1", taken.socket.getsockname()[1])
    everywhere = listen("0.0.0.0", 0)
    everywhere.socket.close()
    assert (everywhere.is_loopback, taken.is_loopback) == (False, True)
    assert everywhere.url.startswith("http://localhost:")
    with pytest.raises(ConfigError, match="upload_bytes"):
        Budget(upload_bytes=0)


# The command


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.usefixtures("tiny_splade_folder")
def test_the_command_serves_and_stops(tmp_path, number, code):
    index = ["index", str(NOTES), "--store", str(tmp_path / "notes"), "--model", "tiny-splade"]
    assert main(index) == 0
    command = [sys.executable, "-m", "vdr_db.cli", "serve", "--store", "notes", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        told = json.loads(process.stdout.readline())
        assert told["documents"] == 3
        assert told["url"].startswith("http://127.0.0.1:")
        with httpx.Client(base_url=told["url"], timeout=60, trust_env=False) as client:
            answer = client.get("/api/search", params={"q": "a tall beast"}).json()
            assert answer["hits"][0]["id"] == "zoo"
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert err.splitlines()[-1] == "vdr-db: stopped"
    assert "Traceback" not in err
    # The folder was let go of: it can be opened at once.
    assert main(["search", "tea", "--store", str(tmp_path / "notes"), "--json"]) == 0


def test_the_command_needs_a_store_that_is_there(tmp_path, capsys):
    assert main(["serve", "--store", str(tmp_path / "none"), "--port", "0"]) == 3
    assert "There is no store" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path):
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from vdr_db.cli.main import main; sys.exit(main(['serve', '--store', 'x', '--port', '0']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 4
    assert "pip install 'vdr-db[serve]'" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_collection_of_images_is_searched_by_uploads(tmp_path):
    pytest.importorskip("PIL.Image")
    from image_folders import write_cross_modal
    from tiny_png import png

    model = write_cross_modal(tmp_path / "model", topk=60)
    files = tmp_path / "images"
    files.mkdir()
    image = png(40, 30, lambda x, y: (6 * x, 8 * y, 90))
    (files / "a.png").write_bytes(image)
    place = ["--store", str(tmp_path / "store"), "--device", "cpu"]
    assert main(["index", "--images", str(files), "--model", str(model), *place]) == 0
    command = [sys.executable, "-m", "vdr_db.cli", "serve", *place, "--port", "0", "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        told = json.loads(process.stdout.readline())
        with httpx.Client(base_url=told["url"], timeout=60, trust_env=False) as client:
            assert client.get("/api/info").json()["images"] is True
            answer = client.post("/api/search/image", files={"image": image})
            assert [hit["id"] for hit in answer.json()["hits"]] == ["a.png"]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
