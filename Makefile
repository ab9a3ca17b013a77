# Two commands do everything: `make demo` runs the main job, `make test` passes the tests. Both set up .venv first.
# Override: PYTHON=python3.12, TORCH=torch==2.15.0, DEMO_ARGS="--seeds 0,1,2", PYTEST_ARGS="-k admm".

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
DEMO_ARGS ?= --seed 0
PYTEST_ARGS ?=
TORCH_VERSIONS ?= 2.11.0 2.13.0 2.15.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD_TOOLS := "scikit-build-core>=0.11" "pybind11>=2.13" "nlohmann-json>=3.11" "cmake>=3.24" ninja numpy
SOURCES := $(shell find csrc python -type f -not -name '*.so' -not -name '*.pyc') CMakeLists.txt pyproject.toml README.md

.PHONY: help setup demo test lint bench gpu wheel test-install test-torch clean

help:
	@echo "make demo          set up, then prune, compact and measure a network on the digits data (about 3 minutes)"
	@echo "make test          set up, then run the tests"
	@echo "make lint          ruff, mypy and clang-format"
	@echo "make bench         every speed figure of the README, on an otherwise idle machine"
	@echo "make gpu           build, test and measure on a GPU (says so and stops where there is none)"
	@echo "make wheel         a wheel in dist/, built in isolation with the pinned torch"
	@echo "make test-install  pip install with and without build isolation, in fresh environments"
	@echo "make test-torch    one wheel under torch $(TORCH_VERSIONS)"

$(BIN)/.torch:
	@echo "structadmm: making $(VENV) with $(TORCH)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "structadmm: needs Python >= 3.10, this is " + sys.version.split()[0])'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -q --upgrade "pip>=24"
	@$(PIP) install -q $(TORCH) $(BUILD_TOOLS)
	@touch $@

# The package is installed as a user would have it, not linked to the source tree; a rebuild is incremental (build/).
$(BIN)/.installed: $(BIN)/.torch $(SOURCES)
	@echo "structadmm: building and installing the package (CPU kernels; CUDA kernels too where nvcc is found)"
	@$(PIP) install -q --no-build-isolation ".[demo,test]"
	@touch $@

setup: $(BIN)/.installed

demo: setup
	@$(BIN)/structadmm run digits $(DEMO_ARGS) || \
	  { echo 'an interrupted demo goes on with: make demo DEMO_ARGS="--seed 0 --resume"'; exit 1; }

test: setup
	@$(BIN)/python -m pytest tests $(PYTEST_ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@find csrc examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.inc' | xargs $(BIN)/clang-format --dry-run --Werror

bench: setup
	$(BIN)/python bench/main_job.py --seeds 0,1,2 --json bench/results/main_job.json
	$(BIN)/python bench/main_job.py --split 1 --seeds 0,1,2 --json bench/results/main_job_split1.json
	$(BIN)/python bench/main_job.py --split 2 --seeds 0,1,2 --json bench/results/main_job_split2.json
	$(BIN)/python bench/project_update.py --json bench/results/project_update.json
	$(BIN)/python bench/admm_cost.py --json bench/results/admm_cost.json
	$(BIN)/python bench/conv_compact.py --targets --threads 1 --json bench/results/conv_compact.json
	@$(PIP) install -q --no-build-isolation ".[bench]"
	$(BIN)/python bench/inference_layers.py --json bench/results/inference_layers.json
	$(BIN)/python bench/inference_layers.py --blocks 2 4 8 16 32 64 --density 0.25 0.1 --threads 1 --json bench/results/inference_layers.json
	$(BIN)/python bench/inference_networks.py --threads 1 2 --json bench/results/inference_networks.json
	$(BIN)/python bench/plot.py
	$(BIN)/python bench/render.py

gpu:
	@bench/gpu

wheel:
	@$(PYTHON) -m pip wheel . --no-deps -w dist

test-install:
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" tests/install/pip_install.sh

test-torch:
	@PYTHON="$(PYTHON)" tests/install/torch_versions.sh $(TORCH_VERSIONS)

clean:
	rm -rf build dist $(VENV)
