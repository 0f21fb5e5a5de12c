# `make demo` and `make test` do all on a fresh machine. Every target sets up what it needs and is quick the second time.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# cpu: no accelerator needed. cuda: vLLM's and PyTorch's CUDA builds.
EXTRA ?= cpu
STAMP := $(VENV)/.installed-$(EXTRA)

.PHONY: setup demo test test-fast check docker image prometheus clean help

help:
	@echo "make demo    the whole method on an embedded tiny model, with vLLM, Ray, DeepSpeed and Docker"
	@echo "make test    all tests"
	@echo "make test-fast  those tests that start no Docker, engine or Ray and don't train: for while you work"
	@echo "make check   linters, types, formatting"
	@echo "make setup   only install ($(VENV)/, the container engine, the sandbox image); EXTRA=cuda for GPUs"
	@echo "make clean   remove what was generated"

$(STAMP): pyproject.toml constraints.txt
	@echo "==> Python packages into $(VENV) (extra: $(EXTRA))"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	@# Compiled once: where Python may not write bytecode, each of a run's processes would compile torch and Ray anew.
	UV_FIND_LINKS="$$PIP_FIND_LINKS" $(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(PY) --constraint constraints.txt -e '.[$(EXTRA),dev]'
	@rm -f $(VENV)/.installed-*; touch $@

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
