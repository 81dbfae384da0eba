# `make test` in a fresh clone needs Python >= 3.12 and nothing else.

.DEFAULT_GOAL := help
.PHONY: help venv demo notebooks test lint format clean

# The first of these that is new enough and can make environments. pyenv's `python3` follows .python-version.
PYTHON ?= $(shell for name in python3 python3.12 python3.13 python3.14 python; do \
	"$$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$name" && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
WITH_TESTS := .venv/.installed-tests
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
# On a machine with an NVIDIA GPU, jax for it: CUDA 13 from driver 580 on. EXTRAS= makes a CPU environment.
CUDA := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d . -f 1)
EXTRAS ?= $(if $(CUDA),$(shell [ "$(CUDA)" -ge 580 ] 2>/dev/null && echo '[cuda13]' || echo '[cuda12]'))
DEMO_ARGS ?=
PYTEST_ARGS ?=

help:
	@echo 'make demo     set up .venv and run the whole path with the embedded model: minutes on two CPU cores'
	@echo 'make test     set up .venv and run every test (PYTEST_ARGS="tests/kernels -x" for some)'
	@echo 'make notebooks run the notebooks and keep their outputs'
	@echo 'make lint     ruff, import-linter, mypy'
	@echo 'make format   rewrite the sources as ruff formats them'
	@echo 'make venv     set up .venv for tests: jaxtune, editable, with the versions of constraints.txt'
	@echo 'make clean    delete .venv and every cache'

venv: $(WITH_TESTS)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'jaxtune needs Python >= 3.12 with venv, and found none: `uv python install 3.12`, `pyenv install 3.12`, or `apt install python3.12-venv`; or PYTHON=/path/to/python make test'; exit 1; }
	@echo "Installing into .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@$(PIP_INSTALL) '.$(EXTRAS)'
	@touch $@

$(WITH_TESTS): $(INSTALLED)
	@echo 'Installing what the tests compare with; torch is large, the first time takes some minutes'
	@$(PIP_INSTALL) '.[test]'
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/jaxtune demo $(DEMO_ARGS)

notebooks: $(WITH_TESTS)
	@cd notebooks && ../$(BIN)/jupyter execute --inplace *.ipynb && rm -rf outputs

test: $(WITH_TESTS)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

lint: $(WITH_TESTS)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(WITH_TESTS)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
