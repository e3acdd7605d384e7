# Two commands do everything on a bare machine: `make demo` and `make test`. The rest is for developers.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.segvit-installed

.PHONY: demo test lint bench build clean

demo: $(INSTALLED)
	$(BIN)/segvit demo --out demo

test: $(INSTALLED)
	SEGVIT_REQUIRE_EXT=1 $(BIN)/python -m pytest

# torch first, so that segvit builds against it (--no-build-isolation) instead of downloading it a second time
$(INSTALLED): pyproject.toml setup.py $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet "torch>=2.11" numpy
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[train,test]"
	touch $@

lint: $(INSTALLED)
	$(BIN)/python -m pip install --quiet ruff clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

bench: $(INSTALLED)
	$(BIN)/python bench/atm_kernel.py

build: $(INSTALLED)
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info demo segvit/*.so $(INSTALLED)
