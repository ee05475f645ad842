# Set-up and the everyday commands: `make` lists them.

PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin

# A constraint file given with -c does not reach the build backend, which pip installs in an environment of its own:
# the variables do, the first for pip before 25.3 and the second for the versions after it.
INSTALL = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.DEFAULT_GOAL := help
.PHONY: help demo test coverage lint types docs format clean

help: ## list these commands
	@echo "Usage: make TARGET [PYTHON=python3.12] [PIP_ARGS='options for pip install, such as another index']"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: .venv/.train ## train a small CNN and a small GRU to exact budgets on real data, and say where the reports are
	$(BIN)/python cnn/train.py
	$(BIN)/python rnn/train.py

test: .venv/.dev ## run the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

coverage: .venv/.dev ## run the test suite and report how much of the code it runs; slower than test
	$(BIN)/python -m coverage erase
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

lint: .venv/.dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev ## check types
	$(BIN)/python .ci/check_types.py

docs: .venv/.docs ## build the documentation site into site/, and fail at the first warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site

format: .venv/.dev ## format, and mend what can be mended safely
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment and the tools' caches; runs/ stays
	rm -rf .venv .coverage* build dist site .mypy_cache .pytest_cache .ruff_cache *.egg-info

# The stamps: installed once, and again when the pinned versions or the project's metadata change.
.venv/.train: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e ".[train]"
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e ".[dev]"
	@touch .venv/.train $@ # dev includes train

.venv/.docs: pyproject.toml constraints.txt | .venv/.dev
	$(INSTALL) -e ".[docs]"
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit( \
		f"{sys.executable} is Python {v[0]}.{v[1]}, needed is 3.11 to 3.13: make ... PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
