"""Without its package an adapter says which extra brings it."""

from __future__ import annotations

import importlib
import sys

import pytest

from vdr_db.errors import MissingExtraError
from vdr_db.sparse import SparseRows


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("langchain", "langchain_core", "langchain"),
        ("langchain", "langchain_qdrant", "langchain"),
        ("haystack", "haystack", "haystack"),
        ("elasticsearch", "elasticsearch.helpers.vectorstore", "elasticsearch"),
    ],
)
def test_the_extra_is_named(monkeypatch, module, package, extra):
    if package == "langchain_qdrant":
        pytest.importorskip("langchain_core", reason="the package before it is missing as well")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"vdr_db.integrations.{module}", raising=False)
    with pytest.raises(MissingExtraError) as caught:
        importlib.import_module(f"vdr_db.integrations.{module}")
    assert f"pip install 'vdr-db[{extra}]'" in str(caught.value)


@pytest.mark.parametrize(
    ("function", "package", "extra"),
    [
        ("semantic_search_qdrant", "qdrant_client", "qdrant"),
        ("semantic_search_elasticsearch", "elasticsearch", "elasticsearch"),
    ],
)
def test_the_client_is_named(monkeypatch, function, package, extra):
    from vdr_db.integrations import semantic_search

    monkeypatch.setitem(sys.modules, package, None)
    rows = SparseRows.from_dicts([{1: 1.0}], 4)
    with pytest.raises(MissingExtraError) as caught:
        getattr(semantic_search, function)(rows, rows)
    assert f"pip install 'vdr-db[{extra}]'" in str(caught.value)


def test_the_functions_for_llamaindex_need_no_package(monkeypatch):
    for package in ("llama_index", "llama_index.core", "qdrant_client"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "vdr_db.integrations.llamaindex", raising=False)
    module = importlib.import_module("vdr_db.integrations.llamaindex")
    assert callable(module.sparse_doc_fn)
