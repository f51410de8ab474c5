# `make` prints the targets. Each does what is missing and nothing twice; one that was interrupted is repaired by the
# next run, because a stamp is removed before its work begins and written after it ended.
#
#   PYTHON=python3.12   the interpreter that .venv is made from (default: the first from 3.11 to 3.14 that is found)
#   ARGS="-k window"    further arguments for pytest (test) or `sightline bench` (demo)
#   MODEL_ARGS="--model DIR_OR_NAME"   further arguments for `sightline demo` (demo)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PACKAGE := $(VENV)/.package
PEERS := build/peers
LIBRARY := python/sightline/_lib/libsightline.so
NATIVE_SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py
CPP_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
PYTHON ?=
PART ?=
ARGS ?=
MODEL_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help env build lint format test demo bench gpu-check wheel clean distclean

help: ## print this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

env: $(PACKAGE) $(LIBRARY) ## create .venv with the package (editable) and everything that development needs

build: $(LIBRARY) ## compile what changed in csrc

# Without the stamp the environment is missing or half installed: begin with an empty one.
$(INSTALLED): requirements-dev.txt
	@if [ ! -e $@ ]; then sh tools/make_venv.sh $(VENV) $(PYTHON); fi
	@rm -f $@
	$(BIN)/python -m pip install -r requirements-dev.txt
	@touch $@

$(LIBRARY): $(NATIVE_SOURCES) $(INSTALLED)
	$(BIN)/python setup.py --quiet build_ext --inplace

$(PACKAGE): pyproject.toml $(INSTALLED) | $(LIBRARY)
	@rm -f $@
	$(BIN)/python -m pip install --quiet --no-build-isolation --constraint requirements-dev.txt --editable '.[dev]'
	@touch $@

lint: env ## ruff, mypy and clang-format, without changing a file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: env ## let ruff and clang-format rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

# One worker per core and one thread per worker: the tests are many and small, but for a few that a worker with nothing
# left to do takes over from the other.
test: env ## everything that a machine without a GPU can test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

demo: env ## the main job: attention, then whole models, over real text at 1K to 16K tokens; results in build/demo
	$(BIN)/sightline bench --output build/demo $(ARGS)
	$(BIN)/sightline demo --output build/demo $(MODEL_ARGS)

# Peers that benchmarks measure where they load. Beside .venv, because the torch that they ask for must not come with
# them; one that cannot be had is left out of the results, which say so.
$(PEERS)/.installed:
	-$(BIN)/python -m pip install --quiet --no-deps --target $(PEERS) zentorch==2.13.0.2 deprecated wrapt && touch $@

bench: env $(PEERS)/.installed ## measure sightline against its peers and regenerate docs/performance.md
	$(BIN)/python benchmarks/attention_parts.py
	PYTHONPATH=$(PEERS) $(BIN)/python benchmarks/attention_ratio.py
	$(BIN)/python benchmarks/decoding_ratio.py
	$(BIN)/python benchmarks/skipping_ratio.py
	$(BIN)/python benchmarks/transformers_ratio.py
	$(BIN)/python benchmarks/attention_options.py
	$(BIN)/python benchmarks/recurrence_ratio.py
	$(BIN)/python benchmarks/render.py

# Wants no .venv: a machine with a GPU brings its own torch and Triton (PYTHON=python3 names the interpreter that has
# them), and often no network.
gpu-check: ## where there is a GPU, ten minutes of: its tests, compute-sanitizer, benchmarks; PART=tests|sanitize|bench|tune
	@$(or $(PYTHON),$(wildcard $(BIN)/python),python3) benchmarks/gpu_check.py $(if $(PART),--part $(PART)) $(ARGS)

# build/lib may hold modules that have been deleted since.
wheel: env ## build the wheel into dist/
	@rm -rf build/lib* build/bdist.* dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist

clean: ## remove what was built; .venv stays
	rm -rf build dist python/sightline/_lib python/*.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)
