"""docs/architecture.md is true: its folders, their floors, and the two ways it describes."""

from __future__ import annotations

import inspect
import re
import runpy
import sys
import threading
from importlib import import_module
from pathlib import Path

import pytest

from vdr_db.cli.main import main
from vdr_db.connectors import VDRQdrant

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FLOOR = runpy.run_path(str(ROOT / "tests" / "test_layers.py"))["FLOOR"]
BORROWED = re.compile(r"as steps (\d+) to (\d+) of the way of one text")
STEP = re.compile(r"`([\w.]+)` \(`([\w/]+)\.py`\): \S")


def folders_of_the_page():
    """Folder -> floor, None for folders without code."""
    rows = re.findall(r"^ +(\d+|-)   ([\w/-]+)  +\S.*$", PAGE, re.MULTILINE)
    assert len(rows) == len({folder for _, folder in rows})
    return {folder: None if floor == "-" else int(floor) for floor, folder in rows}


def room_of(folder):
    return folder.removeprefix("vdr_db").removeprefix("/").replace("/", ".")


def module_of(path):
    dotted = path.replace("/", ".").removesuffix(".__init__")
    return dotted if dotted.startswith("vdr_db") else f"vdr_db.{dotted}"


def rooms_of(modules):
    """Rooms of modules, apart from the lowest floor, which everything passes."""
    return {import_module(module).__package__ for module in modules} - {"vdr_db"}


def function_of(name, path):
    """The function itself, without what a decorator put around it."""
    module = import_module(module_of(path))
    found = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
        found = getattr(found, "__func__", found)
    assert found.__module__ == module.__name__, f"{name} is not written in {path}.py"
    return inspect.unwrap(found)


def steps_of(title):
    """`(name, path)` of the functions listed below a heading, borrowed steps spelled out."""
    (section,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    listed = re.findall(r"^(\d+)\. (.*)$", section, re.MULTILINE)
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    steps = []
    for _, line in listed:
        if borrowed := BORROWED.fullmatch(line):
            first, last = map(int, borrowed.groups())
            steps += steps_of("The way of one text")[first - 1 : last]
        else:
            steps.append(STEP.match(line).groups())
    return steps


class Walk:
    """Records the first call of every function of the library, in all threads started meanwhile."""

    def __enter__(self):
        self.met = {}
        self.modules = set()
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)
        threading.setprofile(None)

    def _note(self, frame, event, argument):
        code = frame.f_code
        if event == "call" and code not in self.met:
            module = frame.f_globals.get("__name__") or ""
            if module.startswith("vdr_db"):
                self.met[code] = len(self.met)
                if code.co_name != "<module>":
                    self.modules.add(module)


def add_one_text(folder):
    with VDRQdrant("articles", path=folder / "articles.qdrant") as articles:
        assert articles.add_texts(["Relativity is by Einstein."], ids=["einstein"]) == ["einstein"]


def ingest_one_record(folder):
    source = folder / "documents.jsonl"
    source.write_text('{"id": "einstein", "text": "Relativity is by Einstein."}\n')
    assert main(["ingest", str(source), "--store", str(folder / "articles.qdrant")]) == 0


def test_folders_are_those_on_disk():
    found = {
        str(path.relative_to(ROOT).parent)
        for top in ("vdr_db", "kernels", "connectors")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    # A checkout may have links in vdr_db/ to the two folders at the root.
    linked = {folder for folder in found if re.match(r"vdr_db/(kernels|connectors)\b", folder)}
    assert set(folders_of_the_page()) == found - linked


def test_floors_are_those_of_the_layers():
    floors = {room_of(folder): floor for folder, floor in folders_of_the_page().items()}
    assert {room: floor for room, floor in floors.items() if floor is not None} == FLOOR


@pytest.mark.parametrize(
    ("title", "go"),
    [("The way of one text", add_one_text), ("The way of one record", ingest_one_record)],
)
def test_the_way_is_the_way(title, go, tmp_path, capsys):
    steps = steps_of(title)
    codes = [function_of(name, path).__code__ for name, path in steps]
    with Walk() as walk:
        go(tmp_path)
    missed = [step for step, code in zip(steps, codes, strict=True) if code not in walk.met]
    assert not missed, f"{title} does not pass {missed}"
    in_order = sorted(zip(codes, steps, strict=True), key=lambda pair: walk.met[pair[0]])
    first_seen = list(dict.fromkeys(steps))
    assert list(dict.fromkeys(step for _, step in in_order)) == first_seen
    told = rooms_of(module_of(path) for _, path in steps)
    assert rooms_of(walk.modules) == told, "the page tells of other rooms than are passed"
