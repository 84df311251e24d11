"""The documentation site: links fit, tables have their files, examples of its own pages run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "scripts" / "docs_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(name, markdown=""):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=name))
    return hooks().on_page_markdown(markdown, page=page)


def test_the_first_page_is_the_readme_with_links_that_fit():
    page = shown("index.md")
    assert page.startswith("# vdr_db")
    targets = re.findall(r"\]\(([^)#\s]+)", page)
    assert any(target == "stores.md" for target in targets)
    for target in targets:
        assert target.startswith("http") or (DOCS / target).is_file(), target


def test_a_link_to_a_file_that_is_no_page_becomes_its_name():
    text = (
        "See [`results`](../benchmarks/results/serve.csv), [ADR](adr/0034-passages.md), [x](no.md)."
    )
    assert shown("passages.md", text) == "See `results`, [ADR](adr/0034-passages.md), [x](no.md)."
    inner = shown("reference/stores.md", "[README](../../README.md#install)")
    assert inner == "[README](../index.md#install)"


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node))
    pages: list[str] = []

    def walk(part):
        for item in part:
            value = next(iter(item.values()))
            walk(value) if isinstance(value, list) else pages.append(value)

    walk(yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)["nav"])
    on_disk = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert set(pages) == {page for page in on_disk if not page.startswith("adr/")}
    assert len(pages) == len(set(pages))


def test_every_table_of_the_benchmarks_has_its_columns():
    text = (DOCS / "benchmarks.md").read_text("utf-8")
    tables = re.findall(r"\{\{ read_csv\('([^']+)', usecols=(\[[^]]+\])\) \}\}", text)
    assert len(tables) == text.count("{{")
    for path, columns in tables:
        header = (ROOT / path).read_text("utf-8").split("\n", 1)[0].split(",")
        assert set(re.findall(r"'(\w+)'", columns)) <= set(header)


def test_the_example_of_the_kernels_runs():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "kernels.md").read_text("utf-8"), re.S)
    names = {}
    exec(code, names)
    assert names["pooled"].logits.shape == (2, 1000)
    assert torch.diff(names["kept"].indptr).tolist() == [32, 32]
