# make demo       the whole way on made-up data, from preprocessing to a figure, in about 25 minutes on 2 CPU cores
# make test       the tests that take seconds each;  make test-slow: every test;  make lint
# make settings   the tables of settings in docs/, from what the trainers declare
# make wheel      the wheel, in build/wheel, installed where nothing else is, where it checks itself
# make docs       the documentation's site, in site/
# make bench      time per step and peak memory of each trainer, against nnUNetTrainer; on a GPU
#                 BENCH="--plan 128 --together 5"
#
# Each of them but wheel first makes a virtual environment in .venv and installs the package there, if that is still
# to be done. PYTHON=python3.12 picks the interpreter, VENV=folder the place, NNUNET=nnunetv2==2.8.0 another nnU-Net,
# TESTS=tests/losses a part of the tests; PARALLEL= runs them in one process, DEMO="--epochs 5" and BENCH="..." add
# options.

PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
# a file is run by one process: the datasets that its tests share are made once
PARALLEL ?= -n auto --dist loadfile
DEMO ?=
BENCH ?=
NNUNET ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow lint docs settings wheel bench

# One thread for each process: the tests' networks are tiny, and 2 cores shared by many threads are slower than 1.
test test-slow: export OMP_NUM_THREADS ?= 1

demo: $(INSTALLED)
	$(BIN)/nnUNetv2_ssl_demo -o demo $(DEMO)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) --durations=10 $(TESTS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) --durations=10 -m "slow or not slow" $(TESTS)

lint: $(INSTALLED) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

settings: $(INSTALLED)
	$(BIN)/python scripts/settings_page.py

wheel:
	rm -rf build/wheel build/clean
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet build/wheel/*.whl
	cd / && nnUNet_raw=/tmp nnUNet_preprocessed=/tmp nnUNet_results=/tmp \
		$(CURDIR)/build/clean/bin/nnUNetv2_ssl_trainers --check

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python scripts/benchmark_trainers.py $(BENCH)

# The stamp is written last, so a broken install is tried again.
$(INSTALLED): setup.py pyproject.toml $(wildcard startup/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(if $(NNUNET),$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(NNUNET)')
	touch $(INSTALLED)
