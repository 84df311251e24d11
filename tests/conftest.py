"""Fixtures and switches for all tests."""

from __future__ import annotations

import os
import signal

# A test run must not depend on a model hub or on what a user's cache happens to hold.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Workers of pytest-xdist share the cores: threads beyond them would only wait for each other.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

# A shell that starts a run in the background has it, and all it starts, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import settings

pytest_plugins = ["forking", "model_fixtures", "search_servers"]

# Shared machines stall at times, so no deadline; CI repeats the same examples on every run.
settings.register_profile("vdr_db", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("vdr_db")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left alone with one at the end.

    pytest-xdist keeps this order with `--no-loadscope-reorder` only; by itself it starts with the
    files that hold the most tests, and slow files hold few.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
