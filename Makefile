# Every target sets up what it needs: .venv is made from pyproject.toml and constraints.txt, and remade when they change.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint bench clean

quickstart: .venv/installed ; $(BIN)/python examples/quickstart.py

test: .venv/installed ; $(BIN)/python -m pytest

lint: .venv/installed ; $(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: .venv/installed ; $(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only -s

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[triton,quickstart,test,dev]'
	touch $@

clean: ; rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .benchmarks
