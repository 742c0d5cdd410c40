# `make demo` and `make test` set everything up themselves: they need Python >= 3.10 and a network for the first installation.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow check fmt bench clean

demo: $(READY)  ## train a small tokenizer on the embedded images and write demo/report.html
	$(BIN)/mergevq demo --out demo --force

test: $(READY)  ## everything but gpu and slow; the second run traces torch.compile, which the shape-checking hook cannot
	$(BIN)/python -m pytest -n 2 --dist loadfile --jaxtyping-packages=mergevq,beartype.beartype
	$(BIN)/python -m pytest -m "compile and not slow and not gpu"

test-slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not gpu"

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fmt: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## tables under benchmarks/results/
	$(BIN)/python -m benchmarks

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) demo dist .pytest_cache .mypy_cache .ruff_cache
