# Every target makes its own environment first: python3, pip, g++ and make are all it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

CSRC      := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
EMULATOR  := $(wildcard tests/emulator/*.h tests/emulator/*.cpp tests/emulator/*.cu)
INSTALLED := $(VENV)/.installed
BUILT     := $(VENV)/.built

.DEFAULT_GOAL := help
.PHONY: help demo test mutants lint bench gpu clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

demo: $(BUILT)  ## train a small model with and without the loss, and draw the result
	$(BIN)/python -m pixcontrast_ext.trainer demo

test: $(BUILT)  ## the whole test suite
	$(BIN)/python -m pytest tests

mutants: $(BUILT)  ## put faults into the CUDA kernels and show which check finds each
	PYTHONPATH=tests $(BIN)/python -m emulator.mutants

lint: $(INSTALLED)  ## ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CSRC),$(BIN)/clang-format --dry-run -Werror $(CSRC) $(EMULATOR))
	$(BIN)/mypy

bench: $(BUILT)  ## time the ops beside their baselines
	$(BIN)/python -m benchmarks

# With the Python at hand and what it has: such machines are often offline.
gpu:  ## build, test and time the kernels on a CUDA device, and write down what came out
	PIXCONTRAST_CUDA=1 $(PYTHON) setup.py --quiet build_ext --inplace
	PYTHONPATH=. $(PYTHON) tests/gpu_report.py $(PARTS)

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info pixcontrast_ext/*.so

# Some distributions ship venv without ensurepip; then the pip at hand installs one.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || \
	    { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }

$(INSTALLED): pyproject.toml constraints.txt setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,bench,dev]"
	touch $@

$(BUILT): $(INSTALLED) $(CSRC)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
