# Needs python3 (3.11 or newer), make and a C compiler, and no rights of an administrator. Everything else is set up in
# .venv from nothing, once.
#   make run          train the quickstart config on this machine's CPU
#   make test         set up, check, then every test that needs no GPU; those of the dashboard's page need a Chromium
#   make test-kernels the tests of the kernels with the Triton of constraints-gpu.txt
#   make test-rest    every test but those of tests/effects
#   make test-long    the tests that take minutes
#   make check        formatting, lint, types
#   make gpu-test     the GPU's tests with the versions of constraints-gpu.txt: in .venv-gpu, or in that of GPU_PYTHON
#   make gpu2-test    those that need two GPUs of one host, with the same
#   make docs         write the pages and the schema that come from the code, then the site of all pages into site/
#   make bench        one training step against transformers

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: run test test-kernels test-rest test-long check gpu-test gpu2-test docs bench

PYTHON ?= python3
GPU_PYTHON ?= .venv-gpu/bin/python
BIN := .venv/bin
SLOWEST := --durations=15 --durations-min=5
PIP_INSTALL := -m pip install --quiet --quiet --disable-pip-version-check
# The version in the command, not only in the constraints: a range would look at every newer build first.
TORCH := $(shell grep '^torch==' constraints.txt)
GPU_PAIR := $(shell grep -v '^\#' constraints-gpu.txt)
GPU_TRITON := $(filter triton==%,$(GPU_PAIR))
INSTALL := $(BIN)/python $(PIP_INSTALL) --constraint constraints.txt $(TORCH)

# `python - PIN ...` ends with a word where another version is imported.
define SAME_VERSIONS
import sys
from importlib.metadata import version
for pin in sys.argv[1:]:
    name, _, wanted = pin.partition("==")
    if (found := version(name).partition("+")[0]) != wanted:
        sys.exit(f"make: {sys.executable}: expected {pin}, got {found}; install constraints-gpu.txt, or start pytest yourself")
endef
export SAME_VERSIONS

run: .venv/.run
	@$(BIN)/nmoe run quickstart
	echo "look at it in a browser: $(BIN)/nmoe viz"

# Two at a time: most tests keep one core busy.
test: check .venv/.triton
	@$(MAKE) --no-print-directory --keep-going test-kernels test-rest > .venv/test-beside.log 2>&1 &
	beside=$$!
	trap 'kill $$beside 2> /dev/null || true' EXIT
	$(BIN)/python -m pytest $(SLOWEST) tests/effects && failed=0 || failed=$$?
	wait $$beside && second=0 || second=$$?
	cat .venv/test-beside.log
	exit $$((failed > 0 ? failed : second))

# Half an hour was too short beside other work on two cores (2026-11-29); a kernel that hangs ends after 50 minutes.
test-kernels: .venv/.triton
	@export PYTHONPATH=$(CURDIR)/.venv/triton
	$(BIN)/python -c "$$SAME_VERSIONS" $(GPU_TRITON)
	echo "the tests of the kernels with $(GPU_TRITON)"
	timeout 3000 $(BIN)/python -m pytest tests/kernels

test-rest: .venv/.dev
	@$(BIN)/python -m pytest $(SLOWEST) --ignore=tests/effects

test-long: .venv/.dev
	@$(BIN)/python -m pytest -m long

check: .venv/.dev
	@$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

gpu-test: $(if $(filter .venv-gpu/bin/python,$(GPU_PYTHON)),.venv-gpu/.test)
	@$(GPU_PYTHON) -c "$$SAME_VERSIONS" $(GPU_PAIR)
	$(GPU_PYTHON) -m pytest -m gpu tests/gpu

gpu2-test: $(if $(filter .venv-gpu/bin/python,$(GPU_PYTHON)),.venv-gpu/.test)
	@$(GPU_PYTHON) -c "$$SAME_VERSIONS" $(GPU_PAIR)
	$(GPU_PYTHON) -m pytest -m gpu2 tests/gpu

docs: .venv/.docs
	@$(BIN)/python -c 'from nmoe.cli.reference import reference; print(reference(), end="")' > docs/cli.md
	$(BIN)/nmoe config reference > docs/config.md
	$(BIN)/nmoe config schema > configs/nmoe.schema.json
	PYTHONPATH=$(CURDIR) $(BIN)/python tests/notebook.py docs/compose.ipynb
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs site
	echo "open site/index.html"

bench: .venv/.dev
	@$(BIN)/nmoe bench step quickstart --against transformers

# Each stamp is newer than what it was made from; `rm -r .venv` starts anew.
.venv/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: python3 is 3.11 or newer, got %d.%d; set PYTHON=..." % sys.version_info[:2])'
	echo "setting up .venv to run: $(TORCH) and what training needs, about two minutes and 1.9 GB"
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[data,viz]'
	touch $@
	echo "set up in $$SECONDS s"

.venv/.dev: .venv/.run
	@echo "setting up .venv to develop: transformers, pytest, ruff, pyright, about a minute"
	$(INSTALL) --editable '.[data,hub,cluster,viz,hf,eval,dev]'
	touch $@
	echo "set up in $$SECONDS s"

.venv/.docs: .venv/.dev
	@echo "setting up Sphinx, a quarter of a minute"
	$(INSTALL) --editable '.[docs]'
	touch $@

# A second Triton beside the first, put before it on the path: torch is not installed twice.
.venv/.triton: constraints-gpu.txt .venv/.dev
	@echo "setting up $(GPU_TRITON) beside .venv's own: 0.7 GB"
	rm -rf .venv/triton
	$(BIN)/python $(PIP_INSTALL) --no-deps --target .venv/triton $(GPU_TRITON)
	touch $@

.venv-gpu/.test: pyproject.toml constraints-gpu.txt
	@echo "setting up .venv-gpu: $(GPU_PAIR) and what the GPU's tests need"
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python $(PIP_INSTALL) --constraint constraints-gpu.txt $(GPU_PAIR) --editable '.[data]' hypothesis pytest
	touch $@
