# Everything here sets up what it needs: Python 3.11 or newer, make and cargo are enough to start.
#
#   VENV=.venv            the environment to make or to use
#   PYTHON=python3.12     the interpreter to make it with
#   PROMPT='...'          what the demo continues
#   ARGS='...'            more arguments for the tool behind a target

SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
export VENV PYTHON
# Absolute, so that tools may change directory.
PY := $(abspath $(VENV))/bin/python

.PHONY: help
help: ## show this list
	@printf 'tilewise: targets of this Makefile (each does its own set-up)\n\n'
	@awk -F ':.*## ' '/^[a-z_-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@printf '\nPYTHON=... chooses the interpreter, VENV=... the environment, ARGS=... goes to the tool.\n'

.PHONY: demo
demo: build ## generate text with the default pair, plain and speculative, and compare
	@$(PY) -m tilewise.cli generate $(if $(PROMPT),'$(PROMPT)') --compare $(ARGS)

.PHONY: test
test: test-rust test-python ## run every test: the Rust core without Python, then pytest

.PHONY: test-rust
test-rust: cargo ## run the tests of the Rust core (no Python involved)
	cargo test --locked --package tilewise-core

.PHONY: test-python
test-python: build ## run the Python tests, the NVRTC gate and the documentation's examples
	$(PY) -m pytest $(ARGS)

.PHONY: lint
lint: lint-rust lint-ruff lint-types lint-stub ## check formats, clippy, ruff, types, and the stub of the extension (-k: go on)

.PHONY: lint-rust
lint-rust: cargo
	cargo fmt --all --check
	PYO3_BUILD_EXTENSION_MODULE=1 PYO3_NO_PYTHON=1 cargo clippy --locked --workspace --all-targets -- -D warnings

.PHONY: lint-ruff
lint-ruff: environment
	$(PY) -m ruff check
	$(PY) -m ruff format --check

.PHONY: lint-types
lint-types: environment
	$(PY) -m pyright --pythonpath $(PY)

.PHONY: lint-stub
lint-stub: build
	$(PY) -m mypy.stubtest tilewise._core --mypy-config-file pyproject.toml

.PHONY: format
format: environment cargo ## rewrite the sources in the one format
	cargo fmt --all
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

.PHONY: bench
bench: build ## measure tilewise beside its peers (BENCH=asv: this commit against BASE=HEAD~1)
ifeq ($(BENCH),asv)
	@$(PY) -m asv machine --yes --config benches/asv.conf.json >/dev/null
	CARGO_TARGET_DIR=$(abspath $(or $(CARGO_TARGET_DIR),target))/asv \
	  $(PY) -m asv continuous --config benches/asv.conf.json --factor 1.1 $(ARGS) $(or $(BASE),HEAD~1) HEAD
else
	$(PY) -m benches.side_by_side $(ARGS)
endif

.PHONY: docs
docs: build ## build the documentation into docs/_build (a warning is an error)
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html $(ARGS)
	@echo "docs/_build/html/index.html"

.PHONY: wheel
wheel: environment cargo ## build a wheel and a source distribution into dist/, and check what is in them
	rm -rf dist
	$(PY) -m maturin build --release --locked --out dist $(ARGS)
	$(PY) -m maturin sdist --out dist
	$(PY) scripts/check_dist.py dist

.PHONY: build
build: environment cargo ## build the extension into python/tilewise
	@bash scripts/build_core.sh

.PHONY: environment
environment: ## make .venv with the locked packages
	@bash scripts/environment.sh

.PHONY: cargo
cargo:
	@command -v cargo >/dev/null || { \
	  echo "make: the core of tilewise is written in Rust and cargo was not found on PATH." >&2; \
	  echo "Get it from https://rustup.rs (or from your system's packages), open a new shell, and run make again." >&2; \
	  exit 1; }

.PHONY: clean
clean: ## remove what was built here (the package cache outside the checkout stays)
	rm -rf target dist docs/_build .asv .pytest_cache .ruff_cache .hypothesis .mypy_cache
	rm -f python/tilewise/_core*.so python/tilewise/_core*.pyd
	find python tests benches examples -name __pycache__ -prune -exec rm -rf {} +
	[ ! -e $(VENV)/tilewise-stamp ] || rm -rf $(VENV)
