"""Fixtures and switches for all tests."""

from __future__ import annotations

import os

# A test run must not depend on a model hub or on what a user's cache happens to hold.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

pytest_plugins = ["model_fixtures", "noida_fixtures"]

# Shared machines stall at times, so no deadline; CI repeats the same examples on every run.
settings.register_profile("vdr_db", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("vdr_db")
