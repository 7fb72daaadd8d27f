# make train   sets up, trains the quickstart, writes a report
# make test    sets up and runs the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Tests run several processes at once: idle threads that sleep leave them the cores. A single
# training run is a third faster when they spin, which is the default.
test test-all: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: train test test-all check format bench clean

train: $(VENV)/.installed
	$(BIN)/routerlab train experiment=quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q --nbmake tests notebooks

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q --nbmake tests notebooks -m "slow or not slow"

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/routerlab bench layer

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@ $(VENV)/.installed
