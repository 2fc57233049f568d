# make demo and make test work from a fresh clone: each makes .venv and installs first.
#
# PYTHON is the interpreter that a new .venv is made with, 3.10 or newer; ARGS is handed on:
#     make PYTHON=python3.12 demo
#     make test ARGS="tests/test_metrics.py -x"

PYTHON = python3
ARGS =

VENV = .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
META = $(VENV)/.installed-meta

.PHONY: help setup setup-meta demo test lint clean

help:
	@echo "make demo     evaluate on the built-in data: tables and a picture"
	@echo "make test     run the tests"
	@echo "make lint     check style and format"
	@echo "make setup    make $(VENV) and install, as the others do when needed"
	@echo "make setup-meta  add learn2learn, for the strategies maml, anil and meta-sgd; needs a C compiler"
	@echo "make clean    remove caches and build folders; $(VENV) and runs stay"

setup: $(INSTALLED)

setup-meta: $(META)

demo: $(INSTALLED)
	$(BIN)/fewref demo $(ARGS)

test: $(INSTALLED)
	$(BIN)/pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist fewref.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# The stamp is older than these files after a change of what is installed.
$(INSTALLED): setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable ".[test,lint]"
	@touch $@

# The C files in learn2learn's distribution are too old for Python 3.11 and later; the word build_ext makes its build
# write them anew with Cython. Of what it asks for, it imports gym and requests; gsutil and qpth are left out.
$(META): | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --upgrade pip cython setuptools wheel
	$(BIN)/python -m pip install gym requests
	$(BIN)/python -m pip install --no-deps --no-build-isolation --config-settings=--global-option=build_ext \
		learn2learn==0.2.0
	@touch $@

# Some systems ship Python with pip but without the parts that venv needs to bring its own; then that pip is used once.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "$(PYTHON) is not found; install Python 3.10 or newer, or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
		echo "$(PYTHON) is `$(PYTHON) --version 2>&1`, 3.10 or newer is needed; name one: make PYTHON=python3.12 ..." >&2; \
		exit 1; }
	@echo "$(PYTHON) -m venv $(VENV)"
	@if $(PYTHON) -c "import ensurepip" 2>/dev/null; then $(PYTHON) -m venv $(VENV); else \
		$(PYTHON) -m venv --without-pip $(VENV) && \
		PYTHONPATH=`$(PYTHON) -c "import os, pip; print(os.path.dirname(os.path.dirname(pip.__file__)))"` \
		$(BIN)/python -m pip install --quiet --ignore-installed pip; \
	fi || { rm -rf $(VENV); exit 1; }
