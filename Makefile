# `make test` in a fresh clone needs Python >= 3.12 and nothing else.

.DEFAULT_GOAL := help
.PHONY: help venv test lint format clean

# The first of these that is new enough and can make environments. pyenv's `python3` follows .python-version.
PYTHON ?= $(shell for name in python3 python3.12 python3.13 python3.14 python; do \
	"$$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$name" && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
PYTEST_ARGS ?=

help:
	@echo 'make test     set up .venv and run every test (PYTEST_ARGS="tests/kernels -x" for some)'
	@echo 'make lint     ruff, import-linter, mypy'
	@echo 'make format   rewrite the sources as ruff formats them'
	@echo 'make venv     set up .venv: jaxtune, editable, with the versions of constraints.txt'
	@echo 'make clean    delete .venv and every cache'

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'jaxtune needs Python >= 3.12 with venv, and found none: `uv python install 3.12`, `pyenv install 3.12`, or `apt install python3.12-venv`; or PYTHON=/path/to/python make test'; exit 1; }
	@echo "Installing into .venv with $$($(PYTHON) --version); torch is large, the first time takes some minutes"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
