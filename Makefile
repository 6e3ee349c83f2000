# Two commands need nothing but Python 3.11 and make; each sets up .venv by itself:
#   make demo    builds a pretrained model for arm64 into build/ and runs it here
#   make test    runs every test, as .ci/run does

PYTHON ?= python3
JOBS ?= 2

# Windows (Git Bash) keeps the programs of a virtual environment elsewhere.
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(wildcard compiler/*.py)
BUNDLE := build/efficientnet-lite0.arm64.edgec

export ORT_DISABLE_TELEMETRY := 1

.PHONY: help demo test test-fast devices setup lint format types docs wheels clean

help:
	@sed -n '1,3s/^# *//p' Makefile
	@echo 'Also: test-fast devices lint format types docs wheels clean'

demo: .venv/installed .venv/demo-fixtures
	$(BIN)/edgec build examples/efficientnet_lite0.py:build --target arm64 \
	    --max-size-mb 5.5 --max-drop 0.05 -o build
	$(BIN)/edgec verify $(BUNDLE) --any-target
	$(BIN)/python examples/classify.py $(BUNDLE)
	@echo 'The whole report, with pictures: build/report.html'

test: .venv/installed .venv/demo-fixtures .venv/test-fixtures
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -n $(JOBS) --dist worksteal

test-fast: .venv/installed .venv/demo-fixtures
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -n $(JOBS) --dist worksteal -m 'not slow'

# Every device that can be had here, and one model per kind on each (over an hour of a core, 4 GB);
# an interrupted run goes on with the same command.
devices: .venv/installed .venv/demo-fixtures .venv/test-fixtures
	$(BIN)/python tests/fixtures/install.py --debian
	-$(BIN)/edgec devices install all
	@mkdir -p build
	$(BIN)/python -W ignore benchmarks/devices.py --rows build/device-rows.jsonl --write docs/targets.md

setup: .venv/installed .venv/demo-fixtures .venv/test-fixtures

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Type checkers do not see the folders of an editable install: show them as links.
types: .venv/installed
	rm -rf .typing
	mkdir -p .typing/edgec
	cd .typing/edgec && ln -s $(addprefix ../../,$(SOURCES)) ../../compiler/devices ../../passes ../../targets .
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/make_cli.py

wheels: .venv/installed
	bash .ci/wheels $(BIN)/python

clean:
	rm -rf build dist .typing .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Each stamp is newer than what it was made from, so a second run has nothing to do.

.venv/bin-made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "edgec needs Python 3.11 or later, and $(PYTHON) is: $$($(PYTHON) --version 2>&1)."; \
	    echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
	    echo "$(PYTHON) has no working venv (Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	@touch $@

.venv/installed: .venv/bin-made pyproject.toml runtime/pyproject.toml constraints.txt
	@echo 'Installing into .venv (torch, onnxruntime and others: some minutes)'
	@$(PIP) install -q -c constraints.txt torch
	@$(PIP) install -q -c constraints.txt -e ./runtime -e '.[dev,fixtures]'
	@touch $@

.venv/demo-fixtures: .venv/installed tests/fixtures/requirements.txt
	@$(BIN)/python tests/fixtures/install.py --demo
	@touch $@

.venv/test-fixtures: .venv/installed tests/fixtures/requirements-test.txt
	@$(BIN)/python tests/fixtures/install.py --test
	@touch $@
