# Two commands: `make demo` runs the main job, `make test` the tests. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-kernels test-gpu lint slow clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/vlmaccel demo

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Kernels without a GPU: what they compute, under Triton's interpreter, and what the compiler makes of them. Two processes,
# since one that interprets does not compile.
test-kernels: $(VENV)/installed
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/kernels/interpreter
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/kernels/compiled

test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu tests/gpu

slow: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
