"""The rooms of the library, read from its sources: imports point downward only, and in no circle.

A room is a folder; its floor is its place in `FLOORS`, and a file imports only from its own room
and from floors below. Imports inside functions count, those under TYPE_CHECKING do not. The
`__init__` files of rooms whose names are lazy import by string, which no reader of imports sees.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS: list[set[str]] = [
    # the files of vdr_db/ itself: errors, sparse, stamp, filters, readers, version; and what is
    # copied into models, which imports nothing of the library
    {"", "data"},
    {"text", "images"},
    {"kernels", "kernels.cpu", "kernels.cuda", "kernels.dispatch"}
    | {"connectors", "connectors.qdrant", "connectors.elasticsearch"},
    {"towers", "ingest"},
    {"checkpoints"},
    {"encoders"},
    {"connectors.collections"},
    {"explain", "evaluation"},
    {"training", "training.images"},
    {"serve", "integrations"},
    {"cli"},
]
# Rooms that are one: a folder inside may import the folder around it, and the reverse.
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FAMILY = ("kernels", "training", "connectors.qdrant", "connectors.elasticsearch", "connectors")
OUTSIDE = {
    "": {"numpy"},
    "kernels": {"numpy", "torch", "triton"},
    "connectors": {
        "numpy",
        "qdrant_edge",
        "qdrant_client",
        "elasticsearch",
        "orjson",
        "grpc",
        "tqdm",
    },
}
"""Packages that a room may import at the top; a search server installs connectors without torch."""

MOVED = {
    "vdr_db.assets": "vdr_db.checkpoints.assets",
    "vdr_db.body": "vdr_db.towers.text_body",
    "vdr_db.connectors.elasticsearch_bodies": "vdr_db.connectors.elasticsearch.bodies",
    "vdr_db.quality": "vdr_db.evaluation.quality",
    "vdr_db.sweep": "vdr_db.evaluation.sweep",
}
"""Documented paths that moved -> where their names are now. They are kept for callers, stand
outside the layers, and nothing of the library imports them."""


def source_files() -> dict[str, Path]:
    """Dotted module name -> file, without the paths that moved."""
    files = {}
    for folder in ("vdr_db", "kernels", "connectors"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [
                *([] if folder == "vdr_db" else [folder]),
                *path.relative_to(ROOT / folder).parts,
            ]
            name = ".".join(["vdr_db", *parts]).removesuffix(".py").removesuffix(".__init__")
            if name not in MOVED:
                files[name] = path
    return files


FILES = source_files()


def room(module: str) -> str:
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return package.removeprefix("vdr_db").removeprefix(".")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@cache
def imported_names(path: Path) -> set[str]:
    """Every name imported anywhere in a file, apart from blocks for type checkers."""
    found = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if is_type_checking(node):
            waiting.extend(node.orelse)  # type: ignore[attr-defined]
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written in full"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))
    return found


def imported_modules(module: str) -> set[str]:
    """Modules of the library that a module imports."""
    found = set()
    for name in imported_names(FILES[module]):
        target = name
        while target and target not in FILES:
            target = target.rpartition(".")[0]
        is_own_package = FILES.get(target, Path()).name == "__init__.py" and module.startswith(
            f"{target}."
        )
        if target and target != module and not is_own_package:
            found.add(target)
    return found


GRAPH = {module: imported_modules(module) for module in FILES}


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph as the names along it, the first again at its end; [] without one."""
    done: set[str] = set()
    for start in sorted(graph):
        way: list[str] = []
        waiting = [(start, iter(sorted(graph.get(start, ()))))]
        while waiting:
            node, following = waiting[-1]
            if not way or way[-1] != node:
                way.append(node)
            for target in following:
                if target in way:
                    return [*way[way.index(target) :], target]
                if target not in done:
                    waiting.append((target, iter(sorted(graph.get(target, ())))))
                    break
            else:
                done.add(node)
                way.pop()
                waiting.pop()
    return []


def is_downward(source: str, target: str) -> bool:
    if source == target or FLOOR[target] < FLOOR[source]:
        return True
    return FLOOR[target] == FLOOR[source] and any(
        source.split(".")[0] == target.split(".")[0] == family.split(".")[0] for family in FAMILY
    )


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_every_room_has_a_floor():
    assert {room(module) for module in FILES} == set(FLOOR)
    assert len(FLOORS) <= 11


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_moved_paths_give_the_same_objects(old, new):
    before, now = import_module(old), import_module(new)
    for name in now.__all__:
        assert getattr(before, name) is getattr(now, name), name


@pytest.mark.parametrize("module", FILES)
def test_nothing_imports_a_moved_path(module):
    names = imported_names(FILES[module])
    assert not {name for name in names if name in MOVED or name.rpartition(".")[0] in MOVED}


def test_no_circle_of_files():
    circle = circle_in(GRAPH)
    assert not circle, "imports go round: " + " -> ".join(circle)


@pytest.mark.parametrize("module", FILES)
def test_imports_point_downward(module):
    for name in imported_names(FILES[module]):
        top = name.partition(".")[0]
        assert top not in {"kernels", "connectors"}, f"{module} imports {name} without its library"
    upward = {target for target in GRAPH[module] if not is_downward(room(module), room(target))}
    assert not upward, f"{module} is on floor {FLOOR[room(module)]} and imports {sorted(upward)}"


@pytest.mark.parametrize("module", FILES)
def test_lower_rooms_import_only_their_own_packages(module):
    allowed = OUTSIDE.get(room(module).split(".")[0])
    if allowed is None:
        return
    tops = {name.split(".")[0] for name in imported_names(FILES[module])}
    foreign = tops - allowed - {"vdr_db"} - set(sys.stdlib_module_names)
    assert not foreign, f"{module} imports {foreign}"
