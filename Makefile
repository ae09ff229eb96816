# make quickstart   the whole chain on this machine        make test   the tests
# PYTHON=/path/to/python chooses the interpreter; both commands share the environment in .venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: quickstart test test-oracle mutants fuzz check format install clean help

# A name on the PATH may be a shim that only prints an error, so each candidate has to run.
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3.11 python3.12 python3; do \
	if "$$name" -c '$(USABLE)' >/dev/null 2>&1; then echo "$$name"; break; fi; done)

INSTALL := .venv/bin/python -m pip install --disable-pip-version-check --no-input -c constraints.txt
# pip's log, reduced to a line for each package it fetches.
PROGRESS := awk '/^ *Downloading/ {print "  " $$2, $$3, $$4; fflush()} /^Installing/ {print "  unpacking"; fflush()}'

quickstart: .venv/.installed ## the whole chain on this machine's CPU; run again to resume
	@.venv/bin/python recipes/pipeline.py --config-name quickstart

test: .venv/.installed ## every test that needs no GPU
	@.venv/bin/python -m pytest -q -n 2 --dist loadfile

test-oracle: .venv-oracle/.installed ## importance and cuts against NVIDIA's ModelOpt (Python 3.11)
	@.venv-oracle/bin/python -m pytest -q tests/oracle/parity.py

mutants: .venv/.installed ## faults put into copies of the sources: do the tests notice each?
	@.venv/bin/python tests/mutants/run.py

fuzz: .venv/.installed ## 10,000 mutations of a sound file for each parser of foreign files
	@.venv/bin/python tests/hostile/fuzz.py

check: .venv/.installed ## linter, formatter, type checker and the rules of the repository
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/python -m pytest -q tests/test_repository.py

format: .venv/.installed ## rewrite files the way `make check` wants them
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

install: .venv/.installed ## the environment alone

clean: ## remove the environment, caches and the quickstart's results
	rm -rf .venv .venv-oracle runs/quickstart .pytest_cache .hypothesis .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

# torch first and alone: it brings the index's build that fits, and nothing after it may choose another.
.venv/.installed: pyproject.toml constraints.txt
	@if [ -z '$(PYTHON)' ]; then \
		echo 'error: no usable Python 3.11 or newer (with venv) found; install one or pass PYTHON=/path/to/python' >&2; \
		exit 2; fi
	@'$(PYTHON)' -c '$(USABLE)' || { \
		echo 'error: PYTHON=$(PYTHON) does not run, lacks venv, or is older than 3.11' >&2; exit 2; }
	@echo "Making .venv with $$('$(PYTHON)' --version) ($(PYTHON)); this is done once and takes some minutes"
	@'$(PYTHON)' -m venv --clear .venv
	@echo 'Installing torch'
	@$(INSTALL) torch | $(PROGRESS)
	@echo 'Installing minitron-nemo and what it needs'
	@$(INSTALL) -e '.[dev]' | $(PROGRESS)
	@touch $@

# Of its own, as ModelOpt pins what the rest leaves open.
.venv-oracle/.installed: pyproject.toml constraints.txt
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
		echo 'error: the oracle needs Python 3.11: make test-oracle PYTHON=/path/to/python3.11' >&2; exit 2; }
	@'$(PYTHON)' -m venv --clear .venv-oracle
	@.venv-oracle/bin/python -m pip install --disable-pip-version-check --no-input -c constraints.txt torch | $(PROGRESS)
	@.venv-oracle/bin/python -m pip install --disable-pip-version-check --no-input -c constraints.txt -e '.[dev,oracle]' | $(PROGRESS)
	@touch $@
