"""Processes made to be killed, forked from one that has imported everything.

An import takes longer than what most of them do before they are killed.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver

import pytest

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("ingest_worker", "rebuild_worker", "opensearchpy", "qdrant_client", "qdrant_edge"),
        *("vdr_db.connectors.elasticsearch.store", "vdr_db.connectors.elasticsearch.opensearch"),
    ]
)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The process that forks starts with this one's paths, which it would not know otherwise.

    From elsewhere, because the current folder would be searched for modules first.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patched.chdir(tmp_path_factory.mktemp("forks"))
        forkserver.ensure_running()
