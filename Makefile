# Each target sets up what it needs, in .venv, from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
SLOW ?= slow or gpu
PIP_FLAGS ?= --quiet --disable-pip-version-check
export TF_CPP_MIN_LOG_LEVEL := 3

.PHONY: demo test test-slow check bench bench-sweep bench-convert clean

demo: .venv/installed
	$(BIN)/python tools/demo.py

test: .venv/installed
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: .venv/installed
	$(BIN)/python -m pytest -n 2 -m "$(SLOW)"

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_parallel.py

bench: .venv/installed
	$(BIN)/visualbert bench --runs 7 --dtype float32,bfloat16,int8 \
		--json docs/performance.json --plot docs/performance.png

bench-sweep: .venv/installed
	$(BIN)/visualbert bench --sweep \
		--json docs/performance-sweep.json --plot docs/performance-sweep.png

bench-convert: .venv/installed
	$(BIN)/python tools/benchmark_convert.py

.venv/installed: setup.cfg pyproject.toml constraints.txt
	@echo "setting up .venv: a few minutes, once"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv demo-out build *.egg-info .pytest_cache .mypy_cache .ruff_cache
