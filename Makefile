# Every target sets up what it needs: .venv is made from pyproject.toml and constraints.txt, and remade when they change.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint typecheck docs docs-serve release-check two-hosts bench bench-steps bench-compare bench-gpu cost-model
.PHONY: kernel-report clean

quickstart: .venv/quickstart ; $(BIN)/python examples/quickstart.py

# One process per core, one thread each.
test: .venv/installed .venv/browser ; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: .venv/installed ; $(BIN)/ruff check . && $(BIN)/ruff format --check .

# Strict: a page that is in no menu, a link that leads nowhere, or a name that is gone ends it. Nothing is fetched.
DOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs
docs: .venv/installed ; $(DOCS) build --strict --quiet && echo "site/index.html"

docs-serve: .venv/installed ; $(DOCS) serve
# Public names and their modules, and a script that uses them, as strictly as mypy can.
typecheck: .venv/installed ; $(BIN)/mypy

# Wheel and sdist, installed and run in empty environments: gigabytes of downloads. ONLY="3.11-oldest ...": some cases.
release-check: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build uv
	$(BIN)/python scripts/release_check.py $(if $(ONLY),--only $(ONLY))

# Two network namespaces as two hosts; needs root and iproute2.
two-hosts: .venv/installed ; PYTHONPATH=.:kernels $(BIN)/python scripts/two_hosts.py

# One thread, whose processor time is measured: other work does not count. THREADS=2 and more: by the clock on the wall.
THREADS ?= 1
bench: .venv/installed
	mkdir -p .benchmarks
	OMP_NUM_THREADS=$(THREADS) PYTHONPATH=.:kernels $(BIN)/python -m pytest benchmarks \
		--benchmark-enable --benchmark-only --benchmark-json=.benchmarks/run.json -s
	$(BIN)/python benchmarks/report.py .benchmarks/run.json

bench-steps: .venv/installed
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(BIN)/python benchmarks/reference_step.py --json benchmarks/steps.json
	$(BIN)/python benchmarks/report.py

bench-compare: .venv/installed ; @$(BIN)/python benchmarks/compare.py --a "$(A)" --b "$(B)"

# A machine with a GPU may have no network: there the Python that already has torch runs it.
bench-gpu:
	if $(PYTHON) -c 'import torch, triton; assert torch.cuda.is_available()' 2>/dev/null; then PY=$(PYTHON); \
	else $(MAKE) .venv/installed && PY=$(BIN)/python; fi && PYTHONPATH=.:kernels $$PY benchmarks/bench_gpu.py $(ARGS)

cost-model: .venv/installed ; $(BIN)/python benchmarks/cost_model.py

kernel-report: .venv/installed ; $(BIN)/python benchmarks/kernel_report.py

# Tests of the report page drive a browser: chromium or google-chrome, if there is one; else it is fetched.
.venv/browser: tests/browser.py .venv/installed ; $(BIN)/python tests/browser.py && touch $@

# What the quickstart needs, and what the tests need.
INSTALL = test -x $(BIN)/python || $(PYTHON) -m venv .venv; \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.venv/quickstart: pyproject.toml constraints.txt
	$(INSTALL) '.[quickstart]'
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(INSTALL) '.[triton,plot,quickstart,focus,docs,test,dev]'
	touch $@ .venv/quickstart

clean: ; rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
