# make demo | make test | make setup | make format | make docs | make dist | make torture.  Other Python: make PYTHON=python3.12 test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := torch==2.13.0
READY := $(VENV)/.ready
CPP := $(wildcard csrc/*.h csrc/*.cpp)

.PHONY: demo test types tests setup format docs dist sanitize torture clean

demo: setup
	$(BIN)/stepquant demo

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(MAKE) --jobs 2 types tests

# Two targets, so that mypy's one process leaves no core idle.
types: setup
	$(BIN)/mypy

tests: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

setup: $(READY)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "stepquant needs Python 3.11 to 3.13, this is $$($(PYTHON) --version 2>&1): make PYTHON=python3.12"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || \
	  echo "note: no C++ compiler, so stepquant runs in plain torch, slower; install g++ and run make again for its kernels"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet "setuptools>=77" wheel ninja numpy
	$(PIP) install --quiet --no-build-isolation --editable ".[dev]"
	@$(BIN)/python -c 'from stepquant.runtime.ops import compiled; print("C++ kernels:", "built" if compiled() else "not built, plain torch instead")'
	touch $@

# Pages of docs/ and of the docstrings: build/docs/index.html.
docs: setup
	$(PIP) install --quiet "pip>=25.1"
	$(PIP) install --quiet --group docs
	$(BIN)/python -m mkdocs build --strict

# dist/: an sdist, and the wheel that is built from it, with kernels for this machine's kind and the pinned torch.
dist: setup
	$(PIP) install --quiet "pip>=25.1"
	$(PIP) install --quiet --group release
	$(BIN)/python -m build --no-isolation

# Long: random kills, damaged artifacts, shared caches, random shapes, every method on every network. Each prints one line; see docs/torture.md.
torture: setup
	nice -n 5 $(BIN)/python -W ignore -m tests.torture.kills --count 50 --seed 0
	nice -n 5 $(BIN)/python -W ignore -m tests.torture.mutations --count 1000 --seed 0
	nice -n 5 $(BIN)/python -W ignore -m tests.torture.caches --count 8 --seed 0
	nice -n 5 $(BIN)/python -W ignore -m tests.torture.shapes --count 10000 --seed 0
	nice -n 5 $(BIN)/python -W ignore -m tests.torture.methods

clean:
	rm -rf build $(VENV)

sanitize: setup
	sh csrc/sanitize.sh $(BIN)/python
