# Every target makes its own environment first: python3, pip, g++ and make are all it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# Some images forbid bytecode, and each of the hundred processes of the tests would compile all of torch's Python anew.
unexport PYTHONDONTWRITEBYTECODE

CSRC      := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
INSTALLED := $(VENV)/.installed
BUILT     := $(VENV)/.built
OLDEST_TRITON := $(VENV)/triton-3.6
TRAINERS      := $(VENV)/trainers
EXAMPLES      := $(VENV)/examples
OLDEST        := $(VENV)/oldest
DOCS          := $(VENV)/docs
WHEELS        := $(VENV)/wheels
OLDEST_TESTS  := compile sampling gather enqueue properties infonce infonce_accuracy infonce_cpu infonce_tiles bank \
                 loss loss_criterion loss_training project regressions backends
APART         := tests/test_gpu_report.py tests/test_packaging.py tests/test_sanitizers.py
QUICK         := $(patsubst %,tests/test_%.py,backends sampling gather enqueue infonce bank loss ops emulator)
PYTHONS       ?= $(PYTHON)
SHARE         ?= 180
NATIVE_SHARE  := $(if $(filter 1,$(SHARE)),1,20)
WIDTHS        ?= 256
SCHEDULES     ?= 20210118
ARCHS         ?= 90
REST          := tests --ignore tests/trainer --ignore tests/examples --ignore tests/test_emulator.py $(APART:%=--ignore %)
OLDEST_SUBSET := any_input or agree or gradient or round$(if $(WIDTHS),, or triton_code)

.DEFAULT_GOAL := help
.PHONY: help demo quick test test-quick test-rest test-emulator test-apart test-training test-triton test-oldest-triton test-trainers test-examples test-oldest test-bf16 mutants lint docs wheels bench gpu clean

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' Makefile

demo: $(BUILT)  ## train a small model with and without the loss, and draw the result
	$(BIN)/python -m pixcontrast_ext.trainer demo

# Two parts at a time, the longest first. In Triton's interpreter, newest and oldest, one in SHARE of each test's combinations
# is run, of the other backends one in twenty, and the newest Triton compiles the kernels for one width and one architecture; the
# emulated kernels meet the sanitizers under one schedule, ThreadSanitizer in a quarter of those alike. SHARE=1 WIDTHS= SCHEDULES=
# ARCHS= runs and compiles all. Waiting threads give their core away (OMP_WAIT_POLICY).
test: $(BUILT)  ## lint, and the test suite (SHARE=1 WIDTHS= SCHEDULES= ARCHS= for every combination)
	@OMP_WAIT_POLICY=passive $(BIN)/python -m tools.parts \
	    test-apart test-rest test-triton test-training test-emulator lint test-oldest-triton

# What shows most mistakes soonest: no process but this one, no compiler beyond the emulator's, no interpreter.
quick: $(BUILT)  ## lint, and a few of the tests of every op: for the time between two edits, two minutes
	@OMP_WAIT_POLICY=passive $(BIN)/python -m tools.parts lint test-quick

test-quick:
	PIXCONTRAST_TEST_SHARE=12 PIXCONTRAST_TEST_BACKENDS=reference,cpu,cuda $(BIN)/python -m pytest -m "not slow" $(QUICK)

test-apart:
	PIXCONTRAST_TEST_BACKENDS=reference,cpu,cuda $(BIN)/python -m pytest $(APART)

test-rest:
	PIXCONTRAST_TEST_SHARE=$(NATIVE_SHARE) PIXCONTRAST_TEST_BACKENDS=reference,cpu,cuda $(BIN)/python -m pytest $(REST)

test-emulator:
	PIXCONTRAST_TEST_SCHEDULES="$(SCHEDULES)" PIXCONTRAST_TEST_BACKENDS=reference,cpu,cuda $(BIN)/python -m pytest tests/test_emulator.py

test-training:
	PIXCONTRAST_TEST_SHARE=$(NATIVE_SHARE) PIXCONTRAST_TEST_BACKENDS=reference,cpu $(BIN)/python -m pytest tests/trainer
	$(BIN)/python -m pytest benchmarks --benchmark-disable

test-triton test-oldest-triton: export PIXCONTRAST_TEST_BACKENDS = triton
test-triton test-oldest-triton: export PIXCONTRAST_TEST_SHARE = $(SHARE)
test-triton test-oldest-triton: export PIXCONTRAST_TEST_ARCHS = $(filter 80 90,$(ARCHS))

test-triton:
	PIXCONTRAST_TEST_WIDTHS="$(WIDTHS)" $(BIN)/python -m pytest $(REST) -k triton

test-oldest-triton: $(OLDEST_TRITON)
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m pytest $(REST) -k "triton and ($(OLDEST_SUBSET))$(if $(WIDTHS), and not triton_code)"

# An environment of its own, as a user's is: each of the trainers brings fifty packages along. The GPU's kernels have no
# part in it.
test-trainers: $(TRAINERS)/.installed  ## the loss inside of Lightning and transformers
	PIXCONTRAST_CUDA_ARCHS=$(ARCHS) $(TRAINERS)/bin/python setup.py --quiet build_ext --inplace
	PYTHONPATH=. PIXCONTRAST_TEST_BACKENDS=reference,cpu $(TRAINERS)/bin/python -m pytest tests/trainers

# Each example to its end, and the blocks of the guide's pages, with the packages that they name. Not a part of `make test`,
# which is as long as it may be: it runs by hand, after a change to examples/, docs/guide/ or what they call.
test-examples: $(EXAMPLES)/.installed  ## the examples, each with the trainer it is for
	PIXCONTRAST_CUDA_ARCHS=$(ARCHS) $(EXAMPLES)/bin/python setup.py --quiet build_ext --inplace
	PYTHONPATH=. PIXCONTRAST_TEST_BACKENDS=reference,cpu $(EXAMPLES)/bin/python -m pytest tests/examples

# Without numpy, which only the trainer needs.
test-oldest: $(OLDEST)/.installed  ## the loss with the oldest torch that is supported (5 GB)
	PIXCONTRAST_CUDA_ARCHS=$(ARCHS) $(OLDEST)/bin/python setup.py --quiet build_ext --inplace
	PIXCONTRAST_TEST_BACKENDS=reference,cpu $(OLDEST)/bin/python -m pytest $(OLDEST_TESTS:%=tests/test_%.py)

test-bf16: $(BUILT)  ## the kernels for AVX512-BF16, on any processor that has AVX-512
	rm -rf build/bf16 && mkdir -p build/bf16
	cp -r csrc setup.py pyproject.toml README.md pixcontrast_ext tests tools build/bf16
	cd build/bf16 && rm -f pixcontrast_ext/*.so && PIXCONTRAST_CUDA=0 CXXFLAGS="-include tests/support/avx512_bf16.h" \
		$(CURDIR)/$(BIN)/python setup.py --quiet build_ext --inplace
	cd build/bf16 && PYTHONPATH=$(abspath build/bf16) PIXCONTRAST_TEST_BACKENDS=cpu \
		$(CURDIR)/$(BIN)/python -m pytest -q $(addprefix tests/test_, $(addsuffix .py, infonce infonce_cpu infonce_accuracy mining))

mutants: $(BUILT)  ## put faults into the CUDA kernels and show which check finds each
	$(BIN)/python -m tools.emulator.mutants

lint: $(INSTALLED)  ## ruff, clang-format, mypy, the workflows' schema
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*.yml)
	$(if $(CSRC),$(BIN)/clang-format --dry-run -Werror $(CSRC))
	$(BIN)/mypy

# Not --quiet, which would hide the warnings from --strict as well. The theme's notice about other projects is switched off.
docs: $(DOCS)/.installed  ## the documentation as a site in build/docs; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# For the Pythons named in PYTHONS; .github/workflows/wheels.yml has cibuildwheel do the same for all of them. With the CUDA
# kernels, which take minutes, where there is an nvcc; PIXCONTRAST_CUDA=0 leaves them out.
wheels: $(WHEELS)/.installed  ## sdist and wheels in dist/, each tried with the oldest and the newest torch (8 GB)
	$(WHEELS)/bin/python -m tools.wheels $(PYTHONS)

bench: $(BUILT)  ## time the ops beside every alternative and write BENCHMARKS.md (an hour on two cores)
	$(BIN)/python -m benchmarks --csv auto
	$(BIN)/python -m benchmarks.pages

# With the Python at hand and what it has: such machines are often offline. PARTS may name some of the parts, and options:
# make gpu PARTS="device sanitize --budget 540"; python -m tools.gpu_report --help has all.
gpu:  ## build, test and time the kernels on a CUDA device, and write down what came out
	$(PYTHON) -m tools.gpu_report $(PARTS)

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info pixcontrast_ext/*.so

# Some distributions ship venv without ensurepip; then the pip at hand installs one.
%/bin/python:
	$(PYTHON) -m venv $* || \
	    { $(PYTHON) -m venv --without-pip $* && $(PYTHON) -m pip --python $@ install pip; }

# The module is compiled while pip unpacks what the constraints name; where there is an nvcc, with the machine code of one
# architecture (ARCHS= is all). torchvision asks for exactly the torch among that, so it cannot bring another one along.
$(INSTALLED): pyproject.toml constraints.txt setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt ninja pybind11 setuptools
	PIXCONTRAST_CUDA_ARCHS=$(ARCHS) $(BIN)/python setup.py --quiet build_ext --inplace & built=$$!; \
	    $(BIN)/python -m pip install --quiet --no-compile -r constraints.txt && wait $$built
	PIXCONTRAST_CUDA_ARCHS=$(ARCHS) $(BIN)/python -m pip install --quiet --no-compile --no-build-isolation -c constraints.txt -e ".[train,bench,dev,models]"
	touch $@

# The oldest Triton that is supported, and a numpy that its interpreter takes.
$(OLDEST_TRITON): $(INSTALLED)
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --target $@ triton==3.6.0 numpy==2.3.5
	touch $@

$(TRAINERS)/.installed: constraints-trainers.txt | $(TRAINERS)/bin/python
	$(TRAINERS)/bin/python -m pip install --quiet -c constraints-trainers.txt \
	    accelerate hypothesis lightning ninja numpy pybind11 pytest setuptools torch transformers
	touch $@

$(DOCS)/.installed: constraints-docs.txt | $(DOCS)/bin/python
	$(DOCS)/bin/python -m pip install --quiet -r constraints-docs.txt
	touch $@

$(WHEELS)/.installed: constraints-wheels.txt | $(WHEELS)/bin/python
	$(WHEELS)/bin/python -m pip install --quiet -r constraints-wheels.txt
	touch $@

$(EXAMPLES)/.installed: constraints-examples.txt | $(EXAMPLES)/bin/python
	$(EXAMPLES)/bin/python -m pip install --quiet -c constraints-examples.txt \
	    accelerate fastai ftfy hypothesis lightning mmcv-lite mmengine mmsegmentation ninja numpy pybind11 pytest \
	    pytorch-ignite pytorch-metric-learning regex segmentation-models-pytorch setuptools torch torchvision transformers
	touch $@

$(OLDEST)/.installed: constraints-oldest.txt | $(OLDEST)/bin/python
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt hypothesis ninja pybind11 pytest setuptools torch
	touch $@

$(BUILT): $(INSTALLED) $(CSRC)
	PIXCONTRAST_CUDA_ARCHS=$(ARCHS) $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
