# make demo   sets up a private environment and runs the main job on real documents
# make test   sets up the same environment and passes every check and test
# make check  formatting, lint and types alone
# make bench  every benchmark of this machine, into benchmarks/results/
# make gpu    kernel tests and benchmarks on a CUDA device (see benchmarks/README.md)

PYTHON ?= python3
VENV ?= .venv
# Installed first and alone: left to pip's resolver, another package may bring another build.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: demo test check bench gpu clean

$(VENV)/ready-base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1" "setuptools>=77"
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/ready-demo: $(VENV)/ready-base
	$(BIN)/python -m pip install --quiet --editable '.[encode,qdrant,cli]' \
		--config-settings editable_mode=strict
	touch $@

SOURCES = $(wildcard vdr_db/*.py vdr_db/*/*.py vdr_db/data/* kernels/*.py connectors/*.py)
$(VENV)/ready-test: $(VENV)/ready-base $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[encode,qdrant,elasticsearch,parquet,train,cli,bench]' \
		--group test --group lint --config-settings editable_mode=strict
	touch $@

demo: $(VENV)/ready-demo
	$(BIN)/vdr-db demo

check: $(VENV)/ready-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python scripts/check_types.py

test: check
	$(BIN)/pytest

clean:
	rm -rf $(VENV) build
