# Every target creates the virtual environment it needs; the second time that takes no time.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One OpenMP thread per test process: two of them on two cores degrade tenfold when anything else runs.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup redis serve test lint format bench protos gpu

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

setup: $(STAMP)  ## create the virtual environment with everything pinned in constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v[:2] <= (3, 13) else f"Penstock needs Python 3.11 to 3.13, {sys.executable} is {v[0]}.{v[1]}; say make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@# torch first and by itself: a CPU build that an index offers is preferred, and the rest then keeps it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@echo "Compiling the CPU kernels, once ..."
	$(BIN)/python -c 'import workers.engine.cpu_engine, workers.worker'
	@# A worker's start otherwise compiles its modules each time where PYTHONDONTWRITEBYTECODE is set, as in many images.
	$(BIN)/python -m compileall -q control_plane kernels kvstore protos workers
	@touch $@

redis:  ## install redis-server where it is missing; the tests and several gateways need it
	@tools/install_redis.sh

serve: $(STAMP)  ## start a prefill worker, a decode worker and the gateway: make serve ARGS='--port 9000'
	$(BIN)/penstock up $(ARGS)

test: $(STAMP) redis  ## run every test
	$(ONE_THREAD) $(BIN)/python -m pytest

lint: $(STAMP)  ## formatting, lint, types, import contracts, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python protos/generate.py --check

format: $(STAMP)  ## format the tree
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## run one benchmark: make bench BENCH=engine ARGS=--quick
	@test -n "$(BENCH)" || { echo "say which: make bench BENCH=$$(ls bench/*.py | xargs -n1 basename -s .py | paste -sd'|')"; exit 2; }
	$(BIN)/python -m bench.$(BENCH) $(ARGS)

protos: $(STAMP)  ## regenerate the code of protos/*.proto
	$(BIN)/python protos/generate.py

gpu:  ## check the GPU's kernels and engine and measure them; plain python3 with torch and triton, nothing installed
	$(PYTHON) tests/gpu/run.py
	$(PYTHON) tests/gpu/run.py --engine
	$(PYTHON) -m bench.gpu
