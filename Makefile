# Every target sets up what it needs. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := smollm2-135m
NEXT := .venv-next
NEXT_PYTHON ?= python3.12
NEXT_JAX := 0.11.2

.PHONY: help setup demo test lint format types parity lowers lowers-next compiles clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## the virtual environment in .venv

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"python: got {v[0]}.{v[1]}; expected 3.11 or newer; run make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(READY)  ## compare methods on a real model, then open runs/demo/report.html
	$(BIN)/kvjax models fetch $(MODEL)
	$(BIN)/kvjax compare --model $(MODEL) --context 2048 --samples turboquant-3 --out runs/demo

test: $(READY)  ## everything: lint, types, doctests, unit tests, real models
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/kvjax models fetch $(MODEL)
	$(BIN)/kvjax models fetch gemma-3-270m
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)  ## style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(READY)  ## rewrite to the style
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: $(READY)  ## mypy
	$(BIN)/mypy

parity: $(READY)  ## also compare with Hugging Face transformers (installs torch)
	$(BIN)/python -m pip install --quiet '.[parity]'
	$(BIN)/python -m pytest tests/models

lowers:  ## kernels lower, and their numbers agree, in the next jax (needs Python 3.12)
	@if ! $(NEXT_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 12))' 2>/dev/null; then \
	  echo "lowers: skipped: $(NEXT_PYTHON) is not Python 3.12 or newer, which jax $(NEXT_JAX) needs; run make lowers NEXT_PYTHON=..."; \
	else $(MAKE) --no-print-directory lowers-next; fi

lowers-next: $(NEXT)/.ready
	$(NEXT)/bin/python -m pytest -q tests/kernels/test_lowers.py tests/kernels/test_packed_decode.py

$(NEXT)/.ready: Makefile
	test -x $(NEXT)/bin/python || $(NEXT_PYTHON) -m venv $(NEXT)
	$(NEXT)/bin/python -m pip install --quiet --disable-pip-version-check jax==$(NEXT_JAX) numpy pytest hypothesis
	touch $@

compiles: $(READY)  ## compile kernels for H200 and TPU without them: registers, spills, instructions
	$(BIN)/python -m pallas_kernels.compile_report --install --out build/compiles.json

clean:  ## forget environments, caches and results
	rm -rf $(VENV) $(NEXT) .jax_cache runs build *.egg-info
