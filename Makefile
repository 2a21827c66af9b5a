# `make run` and `make test` are the two ways in. Both install into .venv first, once.

# OpenMP threads that spin while they wait slow torch many times over when another process shares the cores.
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := .venv/bin

.PHONY: run install test quick thorough mutate lint check clean

run: install            ## distil the shapes teacher into four steps (once), print the table, serve weights/
	$(BIN)/fewstep run

install: .venv/installed

# One process for each core, one thread each: small networks gain nothing from a second thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: .venv/installed-dev      ## every test but half of the slow ones, and whether they notice a third of the mutants
	$(PYTEST) --half --durations=30
	OMP_NUM_THREADS=1 $(BIN)/python tests/proofs/mutate.py --third

thorough: .venv/installed-dev  ## every test, and every mutant
	$(PYTEST)
	$(MAKE) mutate

mutate: .venv/installed-dev    ## change the loss code one thing at a time: does a test by hand notice each?
	OMP_NUM_THREADS=1 $(BIN)/python tests/proofs/mutate.py

quick: lint                    ## lint, and every test that trains nothing for long, starts no process and proves no method
	$(PYTEST) -m "not slow and not process and not proof"

lint: .venv/installed-dev      ## format, style, types, who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

clean:                  ## everything that make made; weights/ and runs/ stay
	rm -rf .venv build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find app distillers tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[raster,openvino]'
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch .venv/installed $@

# The first Python on the path that is new enough, or `make PYTHON=...`; virtualenv where the system splits venv off.
$(BIN)/python:
	@python="$(PYTHON)"; \
	for candidate in python3 python3.13 python3.12 python3.11; do \
	  [ -n "$$python" ] || ! $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || python=$$candidate; \
	done; \
	[ -n "$$python" ] || { echo 'Fewstep needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python' >&2; exit 1; }; \
	echo "$$python -m venv .venv"; \
	$$python -m venv .venv || $$python -m virtualenv --clear .venv || { rm -rf .venv; \
	  echo "$$python can make no virtual environment: install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
