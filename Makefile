# Every target sets up what it needs: .venv is made from pyproject.toml and constraints.txt, and remade when they change.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint bench bench-gpu cost-model kernel-report clean

quickstart: .venv/installed ; $(BIN)/python examples/quickstart.py

# One process per core, one thread each.
test: .venv/installed ; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: .venv/installed ; $(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: .venv/installed ; $(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only -s

# A machine with a GPU may have no network: there the Python that already has torch runs it.
bench-gpu:
	if $(PYTHON) -c 'import torch, triton; assert torch.cuda.is_available()' 2>/dev/null; then PY=$(PYTHON); \
	else $(MAKE) .venv/installed && PY=$(BIN)/python; fi && PYTHONPATH=.:kernels $$PY benchmarks/bench_gpu.py $(ARGS)

cost-model: .venv/installed ; $(BIN)/python benchmarks/cost_model.py

kernel-report: .venv/installed ; $(BIN)/python benchmarks/kernel_report.py

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[triton,plot,quickstart,focus,test,dev]'
	touch $@

clean: ; rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .benchmarks
