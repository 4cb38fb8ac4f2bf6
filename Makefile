# make demo, make test: everything they need is set up in .venv first.
#   PYTHON=python3.12   the interpreter that the environment is made from
#   VENV=path           where the environment is, or is made
#   PY=python3          an interpreter that has torch, triton and pytest already: nothing is set up, this checkout is used as it is
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

ifeq ($(origin PY),command line)
READY :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
READY := $(VENV)/.fused-post-ready
endif

.DEFAULT_GOAL := help
.PHONY: help demo test check lint format types test-gpu bench build clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

demo: $(READY)  ## compile the first case by name: report, error against float64, times
	$(PY) examples/kernelbench.py $(ARGS)

test: $(READY)  ## every test that needs no GPU
	$(PY) -m pytest -m "not gpu" -n $(WORKERS) $(ARGS)

check: lint types test  ## lint, types and test

lint: $(READY)  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)  ## let ruff rewrite the files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(READY)  ## mypy
	$(PY) -m mypy

test-gpu: $(READY)  ## the tests that need a GPU; PY=python3 where nothing can be installed
	@$(PY) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False")'
	$(PY) -m pytest -m gpu -n $(WORKERS) --dist worksteal -v --tb short $(ARGS)

bench: $(READY)  ## benchmarks on this machine's GPU, data into benchmarks/results; PY=python3 as above
	@status=0; for script in epilogue conv_transpose sites training kernelbench models; do $(PY) -m benchmarks.$$script || status=1; done; exit $$status

build: $(READY)  ## sdist and wheel into dist
	rm -rf build dist
	$(PY) -m build --no-isolation

clean:  ## remove what the targets above have made
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --no-build-isolation: the build tools are pinned in requirements/dev.txt, and no second environment is downloaded.
$(VENV)/.fused-post-ready: requirements/tested.txt requirements/dev.txt requirements/models.txt setup.cfg pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements/dev.txt
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements/tested.txt -r requirements/models.txt || echo 'requirements/models.txt could not be installed: the tests of real models will be skipped'
	touch $@
