# make demo | test | lint | help. Each makes a virtual environment first where there is none.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint

help:
	@echo "make demo   ask the small trained checkpoint about a picture; drawings go to demo_output/"
	@echo "make test   run the tests"
	@echo "make lint   check style, types and the direction of imports"
	@echo
	@echo "Variables: ARGS=\"-k pattern\" is passed on to the demo or to pytest,"
	@echo "           PYTHON=$(PYTHON) makes the environment VENV=$(VENV)."

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Written last, so that an installation that broke off is taken up again
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2> /dev/null || echo not there)."; \
	  echo "Name one that is new enough: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@
