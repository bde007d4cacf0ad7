# make demo    fine-tune the embedded pipeline and show the result (about 3 minutes of training on 2 cores)
# make test    format, lint, types, spelling and all tests
# make lint    the first four of these
# make docs    build the documentation site, site/index.html; offline once its tools are installed
# make clean   remove .venv, site and caches (runs/ stays)
#
# PYTHON=/path/to/python chooses the interpreter; otherwise the first Python >= 3.11 found makes .venv.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test lint docs install install-dev install-docs clean

# Spinning OpenMP threads of several processes on the same cores slow each other down many times over.
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := .venv/bin
# The tests use one thread each; a file's tests share what they build.
PYTEST_ARGS ?= --numprocesses logical --maxprocesses 4 --dist loadfile
CODE := ddpo rewards trainers scripts benchmarks tests examples

demo: install
	$(BIN)/ddpo train configs/shapes_ppo.yaml

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: install-dev
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/codespell

# A page that is missing, a link or an anchor that leads nowhere, or a docstring that is not found ends it.
docs: install-docs
	$(BIN)/zensical build --clean --strict --config-file mkdocs.yml
	@echo "open site/index.html"

install: .venv/installed
install-dev: .venv/installed-dev
install-docs: .venv/installed-docs

.venv/bin/python:
	@python="$(PYTHON)"; \
	usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	for candidate in $${python:-python3 python3.13 python3.12 python3.11 python}; do \
	    if "$$candidate" -c "$$usable" >/dev/null 2>&1; then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	    echo "ddpo needs Python >= 3.11 with the venv module; found: $$($${python:-python3} --version 2>&1 | head -n 1)." >&2; \
	    echo "Install one (on Debian and Ubuntu: apt install python3.11-venv), or name it: make PYTHON=/path/to/python" >&2; \
	    exit 1; \
	fi; \
	echo "making .venv with $$("$$found" --version)"; \
	"$$found" -m venv .venv

# Each stamp is newer than what it was installed from, so that a second call does nothing.
.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/installed-docs: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch .venv/installed .venv/installed-docs $@

clean:
	rm -rf .venv build dist site .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
