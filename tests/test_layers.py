"""The layers of the library, read from its sources: imports point downward only.

```
4  cli
3  ingest, training, integrations
2  encoder and what it is made of
1  kernels (torch, triton)    connectors (numpy + a client)    evaluation, assets
0  errors, sparse, vocabulary, stamp, filters, readers, image_files (numpy, standard library)
```

Row 1 never looks sideways: a search server installs connectors without torch.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVEL_OF_MODULE = {
    0: {"errors", "sparse", "vocabulary", "stamp", "filters", "readers", "image_files"},
    1: {"kernels", "connectors", "evaluation", "assets"},
    3: {"ingest", "training", "integrations"},
}
OUTSIDE = {
    "level 0": {"numpy"},
    "kernels": {"torch", "triton"},
    "connectors": {"numpy", "qdrant_edge", "qdrant_client", "elasticsearch", "orjson", "grpc"},
    "evaluation": {"numpy"},
    "assets": set(),
}


def source_files() -> dict[str, Path]:
    """Dotted module name below `vdr_db` -> file."""
    files = {}
    for folder, prefix in (("vdr_db", ""), ("kernels", "kernels."), ("connectors", "connectors.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = prefix + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            files[name.removesuffix(".__init__")] = path
    del files["__init__"]  # the public face; it is lazy, see test_packaging
    return files


def level(module: str) -> int:
    top = module.split(".")[0]
    if top.startswith("cli") or top in {"demo", "__main__"}:
        return 4
    return next((rank for rank, names in LEVEL_OF_MODULE.items() if top in names), 2)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in a file, apart from blocks for type checkers."""
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
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))
    return found


FILES = source_files()


def test_the_sources_are_found():
    assert {"errors", "sparse", "vocabulary", "kernels.reference", "connectors.base"} <= set(FILES)
    assert level("kernels.reference") == 1
    assert level("encoder") == 2
    assert level("cli_search") == 4


@pytest.mark.parametrize("module", FILES)
def test_imports_point_downward(module):
    own_top = module.split(".")[0]
    for name in imports(FILES[module]):
        top, _, rest = name.partition(".")
        assert top not in {"kernels", "connectors"}, f"{module} imports {name} without its library"
        if top != "vdr_db" or not rest:
            continue
        target = rest.split(".")[0]
        if target == own_top or level(target) < level(module) or target == "__version__":
            continue
        is_sideways = level(target) == level(module) and level(module) != 1
        is_public_face = target in {"SparseRows", "Vocabulary", "EncoderStamp", "VdrError"}
        assert is_sideways or is_public_face, f"{module} must not import vdr_db.{rest}"


@pytest.mark.parametrize("module", FILES)
def test_lower_layers_import_only_their_own_packages(module):
    key = "level 0" if level(module) == 0 else module.split(".")[0]
    if key not in OUTSIDE:
        return
    tops = {name.split(".")[0] for name in imports(FILES[module])}
    foreign = tops - OUTSIDE[key] - {"vdr_db"} - set(sys.stdlib_module_names)
    assert not foreign, f"{module} imports {foreign}"
