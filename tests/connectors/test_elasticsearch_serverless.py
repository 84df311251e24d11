"""A serverless project of Elasticsearch: no shards, no replicas, no upkeep by the caller.

The server is the stand-in behind a proxy that refuses what such a project refuses, in its words.
"""

from __future__ import annotations

import json

import pytest
import services
from fault_proxy import Answer
from sparse_samples import zipf_rows

from vdr_db.errors import StoreError

ROWS = zipf_rows(20, 10, 200, seed=3)
REFUSED = ("number_of_shards", "number_of_replicas")


def refuse(request):
    """What a serverless project does not know."""
    if any(part in request.path for part in ("/_flush", "/_forcemerge")):
        return answer(410, "api_not_available_exception", "not available in serverless mode")
    if request.method == "PUT" and any(name.encode() in request.body for name in REFUSED):
        told = "Settings [index.number_of_shards,...] are not available in serverless mode"
        return answer(400, "illegal_argument_exception", told)
    return None


def answer(status, kind, reason):
    error = {"error": {"type": kind, "reason": reason}, "status": status}
    return Answer(status, (("X-Elastic-Product", "Elasticsearch"),), json.dumps(error).encode())


@pytest.fixture
def project(open_store, server, monkeypatch):
    """Opens stores of a project."""
    if server.is_real:
        pytest.skip("OpenSearch has no such projects")
    from vdr_db.connectors.elasticsearch import indices

    read = indices.read_settings

    def without(transport, index):
        return {n: v for n, v in read(transport, index).items() if n.split(".")[-1] not in REFUSED}

    # The stand-in tells settings that a project keeps to itself.
    monkeypatch.setattr(indices, "read_settings", without)

    def open_one(**options):
        store = open_store(**{"replicas": None, **options})
        server.proxy.decide = refuse
        return store

    return open_one


def test_a_serverless_project_is_filled_and_rebuilt(project):
    store = project()
    store.create(200)
    store.upsert(ROWS, list(range(20)))
    with store.loading():
        store.upsert(ROWS[:5], list(range(20, 25)))
    assert store.count() == 25
    store.flush()
    store.optimize()
    with store.rebuild(expected=20) as fresh:
        fresh.upsert(ROWS, list(range(20)))
    assert store.count() == 20


def test_shards_that_are_asked_for_are_refused_in_its_words(project):
    store = project(name=services.unique_name(), replicas=1)
    with pytest.raises(StoreError, match="not available in serverless mode"):
        store.create(200)
