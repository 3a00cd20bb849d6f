# Needs python3 (3.11 or newer), make and a C compiler. Everything else is set up in .venv from nothing, once.
#   make run       train the quickstart config on this machine's CPU
#   make test      set up, check, then every test that needs no GPU
#   make test-long the tests that take minutes
#   make check     formatting, lint, types
#   make gpu-test  the GPU's tests, in an environment that has a CUDA build of torch: GPU_PYTHON, not .venv
#   make bench     one training step against transformers

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: run test test-long check gpu-test bench chromium

PYTHON ?= python3
GPU_PYTHON ?= python3
BIN := .venv/bin
# The version in the command, not only in the constraints: a range would look at every newer build first.
TORCH := $(shell grep '^torch==' constraints.txt)
INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt $(TORCH)

run: .venv/.run
	@$(BIN)/nmoe run quickstart

test: check chromium
	@$(BIN)/python -m pytest

test-long: .venv/.dev chromium
	@$(BIN)/python -m pytest -m long

# The tests of the dashboard's page run in Debian's Chromium.
chromium:
	@command -v chromium > /dev/null && exit
	echo "installing chromium for the tests of the dashboard"
	{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes chromium; } > /dev/null

check: .venv/.dev
	@$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

gpu-test:
	@$(GPU_PYTHON) -m pytest -m gpu tests/gpu

bench: .venv/.dev
	@$(BIN)/nmoe bench step quickstart --against transformers

# Each stamp is newer than what it was made from; `rm -r .venv` starts anew.
.venv/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: python3 is 3.11 or newer, got %d.%d; set PYTHON=..." % sys.version_info[:2])'
	echo "setting up .venv to run: $(TORCH) and what training needs, about two minutes and 1.9 GB"
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[data]'
	touch $@
	echo "set up in $$SECONDS s"

.venv/.dev: .venv/.run
	@echo "setting up .venv to develop: transformers, pytest, ruff, pyright, about a minute"
	$(INSTALL) --editable '.[data,hub,cluster,viz,hf,dev]'
	touch $@
	echo "set up in $$SECONDS s"
