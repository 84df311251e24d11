# make demo   sets up a private environment and runs the main job on real documents
# make test   sets up the same environment and passes every check and test
# make check  formatting, lint and types alone
# make docs   the documentation site, strictly, into build/site
# make workflows  checks .github/workflows with actionlint, built from its Go module
# make bench  every benchmark of this machine, into benchmarks/results/
# make train-mini        trains the model `vdr-mini` again: ABSTRACTS=FOLDER adds texts
# make train-mini-image  trains the image part of `vdr-mini` again (needs npm)
# make gpu    kernel tests, sanitizer and benchmarks on a CUDA device (see benchmarks/README.md)
# make gate   compiles every kernel for every card with three versions of Triton, and runs their tests
#             by the interpreter of each; takes two hours

PYTHON ?= python3
VENV ?= .venv
# Of the tests alone. Installed first: left to pip's resolver, another package may bring another build.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
# Test files that run at the same time: one more than there are cores, as many wait for servers.
JOBS ?= $(shell $(PYTHON) -c "import os; print(min(4, 1 + (os.cpu_count() or 1)))")

.PHONY: demo test check docs workflows bench gpu gate train-mini train-mini-image clean

$(VENV)/ready-base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1" "setuptools>=77"
	touch $@

$(VENV)/ready-demo: $(VENV)/ready-base
	$(BIN)/python -m pip install --quiet --editable '.[cli]' --config-settings editable_mode=strict
	touch $@

SOURCES = $(wildcard vdr_db/*.py vdr_db/*/*.py vdr_db/*/*/*.py vdr_db/data/* vdr_db/models/*/* \
	kernels/*.py kernels/*/*.py connectors/*.py connectors/*/*.py)
$(VENV)/ready-test: $(VENV)/ready-base $(SOURCES)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet \
		--editable '.[gpu,export,openvino,qdrant,elasticsearch,parquet,train,images,cli,bench]' \
		--group test --group lint --config-settings editable_mode=strict
	touch $@

demo: $(VENV)/ready-demo
	$(BIN)/vdr-db demo

check: $(VENV)/ready-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python scripts/check_types.py

# MkDocs reads the sources, it imports nothing; so its packages suffice.
$(VENV)/ready-docs: $(VENV)/ready-base
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

docs: $(VENV)/ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Its package on the index of Python fetches a program from elsewhere when it is installed.
ACTIONLINT = github.com/rhysd/actionlint/cmd/actionlint@v1.7.12
workflows: $(VENV)/ready-base
	test -x $(BIN)/actionlint || GOBIN=$(abspath $(BIN)) go install $(ACTIONLINT)
	$(BIN)/actionlint .github/workflows/*.yml

test: check
	$(BIN)/pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

clean:
	rm -rf $(VENV) build

# DATA holds BEIR folders; benchmarks that need none run without it.
bench: $(VENV)/ready-test
	$(BIN)/python benchmarks/bench_head_cpu.py
	$(BIN)/python benchmarks/bench_search.py
	$(BIN)/python benchmarks/bench_es_body.py
	$(if $(DATA),$(BIN)/python benchmarks/bench_encoding.py $(DATA) --out benchmarks/results/encoding_cpu.csv)
	$(BIN)/python benchmarks/bench_training.py --out benchmarks/results/training_cpu.csv
	$(BIN)/python benchmarks/bench_images.py --out benchmarks/results/images.csv
	$(if $(DATA),$(BIN)/python benchmarks/bench_quality.py demo $(DATA) --out benchmarks/results/quality.csv)

# CACHE keeps pairs, checkpoints and log: a run that was stopped goes on.
train-mini: CACHE ?= build/train-mini
train-mini: $(VENV)/ready-test
	$(BIN)/python scripts/train_mini.py --cache $(CACHE) --out vdr_db/models/vdr-mini \
		$(if $(ABSTRACTS),--abstracts $(ABSTRACTS))

train-mini-image: CACHE ?= build/train-mini-image
train-mini-image: $(VENV)/ready-test
	$(BIN)/python -m pip install --quiet resvg-py
	$(BIN)/python scripts/train_mini_image.py --cache $(CACHE) --out vdr_db/models/vdr-mini --dense

gpu: $(VENV)/ready-test
	$(BIN)/python benchmarks/sanitize.py
	$(BIN)/python benchmarks/bench_kernels.py

# Kernels compiled for every card with the oldest Triton, the one that torch brings, and the newest, and
# tested with each by its interpreter, whose oldest needs a NumPy before 2.4. CI compiles what a change
# touches, for two cards.
TRITONS = 3.4.0 3.7.1 3.9.0
CARDS = 80 86 89 90 100 120
build/triton-%: $(VENV)/ready-base
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ "triton==$*" "numpy<2.4"

gate: $(VENV)/ready-test $(TRITONS:%=build/triton-%)
	for version in $(TRITONS); do \
		export PYTHONPATH=$(CURDIR)/build/triton-$$version && \
		$(BIN)/python benchmarks/compile_gate.py --check --write --sm $(CARDS) && \
		$(BIN)/pytest -q tests/kernels/test_triton_interpreter.py || exit 1; \
	done
