# Every target does its own set-up; PYTHON may name any Python 3.11 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= gradflow-demo
PIP = $(BIN)/python -m pip install --quiet --constraint constraints.txt
.PHONY: demo test test-slow test-cuda zoo docs lint bench wheel clean

demo: $(VENV)/.ready
	$(BIN)/gradflow demo --out $(OUT)

test: $(VENV)/.ready lint
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 -m slow

test-cuda: $(VENV)/.ready
	$(BIN)/python -m pytest tests/test_cuda.py
	$(BIN)/python -m pytest --device cuda tests/test_exactness.py tests/test_layers.py tests/test_gradient_semantics.py \
		tests/test_probe.py tests/test_published_results.py

zoo: $(VENV)/.ready
	PYTHONPATH=tests $(BIN)/python -W ignore -m zoo.score --write

docs: $(VENV)/.ready
	PYTHONPATH=tests $(BIN)/python -W ignore -m zoo.pages

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python tests/benchmarks/overhead.py

wheel: $(VENV)/.ready
	$(BIN)/python -m build

$(VENV)/.ready: pyproject.toml constraints.txt setup.py $(wildcard gradflow/_*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or newer, got " \
		+ sys.version.split()[0] + " from $(PYTHON); run: make PYTHON=/path/to/python3.11")'
	@# Some systems ship Python without ensurepip: then the environment gets its pip from the system's.
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
