# Each target does its own set-up; a stamp in .venv keeps it from being done twice.
#   make demo     from text to a trained model, on two CPU cores
#   make demo-chat   that model learns to answer questions: fine-tuning, a reward model, DPO
#   make test-fast   the tests that start no second process and compile nothing: for the inner loop
#   make test     those before a commit: of each law some cases, in which between them all that matters meets
#   make test-all   every test, and pretraining's layouts again without kernels, which the later stages share with it
#   make parity   the layouts against one process, once with the native kernels and once in plain PyTorch; of which
#                 KERNELS=reference and PARITY=tests/parity/test_parity.py are a part
PYTHON ?= python3
KERNELS ?= native reference
PARITY ?= tests/parity
FAST := tests/config tests/data tests/kernels tests/parallel tests/text tests/test_imports.py \
        tests/test_wording.py
PIP := .venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
INPUTS := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*)

.PHONY: install demo demo-chat test test-fast test-all parity lint format clean
.DELETE_ON_ERROR:

install: .venv/installed-all

# What running needs. PyTorch goes first: building the package needs it.
.venv/installed: $(INPUTS)
	@echo "Installing PyTorch and llm3d into .venv ..."
	$(PYTHON) -m venv .venv
	$(PIP) setuptools wheel torch
	$(PIP) --no-build-isolation --editable .
	@touch $@

# And what the tests compare against.
.venv/installed-all: .venv/installed
	@echo "Installing what tests and checks need ..."
	$(PIP) --no-build-isolation --editable ".[test,dev,megatron]"
	@touch $@

demo: .venv/installed
	.venv/bin/python launch/demo.py

demo-chat: .venv/installed
	.venv/bin/python launch/demo_chat.py

# One thread a process: the tests start many. Each of the two workers takes whole files, in the order that
# tests/conftest.py gives them, and has its own eight ranks.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
          --durations=25

test: install
	$(PYTEST)

test-fast: install
	$(PYTEST) -m "not distributed and not slow and not all_layouts" $(FAST)

test-all: install
	$(PYTEST) -m ""
	$(MAKE) parity KERNELS=reference PARITY=tests/parity/test_parity.py

parity: install
	for kernels in $(KERNELS); do \
	    LLM3D_KERNELS=$$kernels $(PYTEST) $(PARITY) || exit 1; done

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: install
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
