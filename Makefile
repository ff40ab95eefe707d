# Needs Python 3.11+ with its venv module, and a package index.
# Behind a mirror, name it to both installers: in pip's usual settings and in UV_DEFAULT_INDEX.
PYTHON ?= python3
UV_VERSION := 0.13.8
VENV := .venv
BIN := $(VENV)/bin
UV := $(VENV)/uv-tool/bin/uv
STAMP := $(VENV)/.up-to-date
MODERN := import sys, venv; sys.exit(sys.version_info < (3, 11))

export PATH := $(CURDIR)/$(BIN):$(PATH)

.NOTPARALLEL:
.PHONY: help env book test lint types unit parameter site lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(STAMP) ## create .venv from requirements.lock, or bring it up to date

$(STAMP): requirements.lock pyproject.toml $(UV)
	$(UV) pip sync --python $(BIN)/python --require-hashes requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# uv has an environment of its own, because `uv pip sync` removes whatever is not in the lock.
$(UV):
	@$(PYTHON) -c '$(MODERN)' 2>/dev/null || { \
	  echo "$(PYTHON) is not Python 3.11 or newer with its venv module; name one that is: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -c '$(MODERN)' 2>/dev/null || $(PYTHON) -m venv --clear --without-pip $(VENV)
	$(PYTHON) -m venv --clear $(VENV)/uv-tool
	$(VENV)/uv-tool/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

book: env ## build the site afresh into _build/html; a warning fails the build
	rm -rf _build
	$(BIN)/jupyter-book build book/ -W -n --keep-going

test: lint types unit parameter book site ## run everything that guards the project

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

# The tests of an extra skip where it is missing; here none may be.
unit: env
	$(BIN)/python -c 'import ale_py, distributed, foolbox, stable_baselines3, torchattacks, triton'
	$(BIN)/pytest --nbval --durations=10 --ignore=tests/site

# The book's own numbers are shown without the data set; what is not in the store is computed when a notebook asks.
parameter: env
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	SAPCORE_DATA="$$folder" $(BIN)/papermill book/04_iterative.ipynb "$$folder/out.ipynb" -p eps 4 && \
	SAPCORE_RESULTS="$$folder" $(BIN)/papermill book/04_iterative.ipynb "$$folder/out.ipynb" \
	  -p eps 3 -p dataset digits -p examples 20 -p passes 2 && \
	SAPCORE_DATA="$$folder" $(BIN)/papermill book/11_adaptive_attacks.ipynb "$$folder/out.ipynb" \
	  -p eps 8 -p dataset digits -p examples 50

site: env
	$(BIN)/pytest tests/site

lock: $(UV) ## pin what pyproject.toml asks for; pins that are there stay (delete the lock to move them all)
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --all-extras \
	  --custom-compile-command 'make lock' --output-file requirements.lock pyproject.toml

clean: ## remove the environment, the site and all caches
	rm -rf $(VENV) _build .mypy_cache .pytest_cache .ruff_cache .hypothesis sapcore.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
