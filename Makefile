# make quickstart   install, then the whole main job on the CPU with a tiny model (minutes)
# make test         install, then the tests but the heavy ones (JOBS=2 at a time);  make test-heavy: those (3: many wait)
# make schema       recipes/schema/TASK.json from the keys of the code: after a change of them
# make lint         ruff and mypy;  make bench: the benchmarks as JSON lines;  make install: .venv alone
# make install-full vLLM, DeepSpeed and bitsandbytes for the CPU as well (3 GB)
#
# PYTHON=python3.12 picks the interpreter, VENV=DIR the environment, TORCH='torch==2.13.0 --index-url URL' the torch build.

VENV ?= .venv
JOBS ?= 2
HEAVY_JOBS ?= 3
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
export DS_BUILD_OPS := 0
PIP := @$(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_FULL := $(VENV)/.installed-full

.PHONY: help quickstart install install-full test test-heavy schema lint format bench wheel clean

help:
	@sed -n '/^$$/q;s/^# \{0,1\}//p' Makefile

quickstart: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh recipes/quickstart/run.sh

install: $(INSTALLED)

install-full: $(INSTALLED_FULL)

# Tests that hold times run alone, the others on $(JOBS) processes; both parts run even if the first fails.
test: $(INSTALLED_DEV)
	@failed=0; \
	$(BIN)/python -m pytest -m "timed and not heavy" || failed=1; \
	$(BIN)/python -m pytest -m "not timed and not heavy" -n $(JOBS) --dist loadfile --no-loadscope-reorder || failed=1; \
	exit $$failed

test-heavy: $(INSTALLED_DEV) $(INSTALLED_FULL)
	@failed=0; \
	$(BIN)/python -m pytest -m "heavy and not timed" -n $(HEAVY_JOBS) --dist loadfile --no-loadscope-reorder || failed=1; \
	$(BIN)/python -m pytest -m "heavy and timed" || failed=1; \
	exit $$failed

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

schema: $(INSTALLED)
	@mkdir -p recipes/schema
	@for task in sft rm ppo reft oreo; do $(BIN)/python -m rlhfctl recipes schema $$task > recipes/schema/$$task.json; done

bench: $(INSTALLED)
	@$(BIN)/python -m benchmarks
	@$(BIN)/python -m benchmarks.serve_rm

wheel: $(INSTALLED)
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .quickstart

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "rlhfctl needs Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) 2>/dev/null || $(PYTHON) -m venv --clear --without-pip $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m pip --python $(BIN)/python install --quiet pip

# The stamps are written last: an interrupted installation starts again, a finished one is not repeated.
$(INSTALLED): requirements/cpu.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing torch and requirements/cpu.txt into $(VENV) (about 1.5 GB, minutes)" >&2
	$(PIP) $(TORCH)
	$(PIP) --no-deps -r requirements/cpu.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(INSTALLED_DEV): requirements/dev.txt $(INSTALLED)
	$(PIP) --no-deps -r requirements/dev.txt
	@touch $@

$(INSTALLED_FULL): requirements/full.txt $(INSTALLED)
	$(PIP) setuptools==78.1.1 wheel ninja
	$(PIP) --no-deps --no-build-isolation -r requirements/full.txt
	@touch $@
