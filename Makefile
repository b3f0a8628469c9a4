# Everything happens in .venv; its stamp file says which pyproject.toml it was made from.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# pip would otherwise take the newest torch with several gigabytes of CUDA packages. On a GPU host run
# `make TORCH=torch serve`; for an index with CPU builds, set TORCH_INDEX to it.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

.PHONY: help install serve test test-slow lint bench clean
.DEFAULT_GOAL := help

help:  ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(STAMP)  ## the virtual environment

$(STAMP): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $(STAMP)

serve: $(STAMP)  ## start the demo on http://127.0.0.1:8000; Ctrl-C stops it
	@exec $(VENV)/bin/loom serve $(ARGS)

test: $(STAMP)  ## everything that needs no GPU, but the slow ones
	$(VENV)/bin/python -m pytest -m "not slow and not benchmark" $(ARGS)

test-slow: $(STAMP)  ## the slow ones
	$(VENV)/bin/python -m pytest -m "slow and not benchmark" $(ARGS)

lint: $(STAMP)  ## ruff, mypy, import rules
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(STAMP)  ## comparisons, both sides in one run
	$(VENV)/bin/python -m tests.benchmarks.mixed_batch $(ARGS)

clean:  ## forget the environment and all state
	rm -rf $(VENV) .loom build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
