# make demo         fine-tune a small pretrained model, end to end
# make test         every test that is quick enough: 25 minutes
# make test-long    what takes too long for `make test`; CI runs it too
# make test-sweeps  10,000 damaged inputs, 200 damaged runs, faults in exports of every family: an hour or more
# make test-slurm   the tests of a real Slurm cluster on this machine, all of them: an hour; leaves a table of results
# make test-recipes every shipped recipe, run on a small twin of its model: minutes; leaves a table of results
# make test-nvme    optimizer state on a disk; needs libaio's headers, and compiles for minutes
# make test-architectures  every causal architecture of transformers as a small twin: an hour or two; goes on where it
#                   was stopped, and leaves a table
# make test-calls   2,501 function-calling tasks through every chat template that knows tools: half an hour; leaves a table
# make lint         lint and types
# make check        the same and the fast tests
#
# Each installs what it needs into .venv first. VENV=path uses another environment as it is, if it exists.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
VENV   ?= .venv
BIN    := $(VENV)/bin

# Tasks of a benchmark, for tests that only read its files: it goes into a folder of its own, without the fifty packages
# that it asks for.
CALLS  := bfcl-eval==2026.3.23

# The stamp's name changes with what is installed, so an old environment is brought up to date.
KEY    := $(shell (cat pyproject.toml constraints.txt; echo $(CALLS)) | cksum | cut -d' ' -f1)
STAMP  := $(VENV)/.galley-$(KEY)

.PHONY: demo test test-long test-sweeps test-slurm test-recipes test-nvme test-architectures test-calls lint check golden clean

demo: $(STAMP)
	$(BIN)/python demo/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long

test-sweeps: $(STAMP)
	$(BIN)/python -m pytest -m sweep

# The cluster's own tests, with those that wait for Slurm's slow clocks.
test-slurm: $(STAMP)
	PYTHONPATH=tests GALLEY_SLURM_SLOW=1 GALLEY_SLURM_RESULT=benchmarks/results/slurm-$(shell date +%F).md \
	  $(BIN)/python -m pytest tests/slurm -m "not sweep" -p slurm.result

# Every recipe: two steps, a checkpoint, two more from it, an export.
test-recipes: $(STAMP)
	PYTHONPATH=tests GALLEY_RECIPES=all GALLEY_RECIPES_RESULT=benchmarks/results/recipes-$(shell date +%F).md \
	  $(BIN)/python -m pytest tests/recipes -s -p recipes.result

# Two of DeepSpeed's operators more, which take three minutes to compile.
test-nvme: $(STAMP)
	GALLEY_NVME=1 $(BIN)/python -m pytest tests/train/test_nvme.py

# Prepare, LoRA and export of each; MINUTES=8 stops after so many, and the next call goes on.
test-architectures: $(STAMP)
	$(BIN)/python tests/architectures/sweep.py benchmarks/results/architectures-$(shell date +%F).md $(MINUTES)

test-calls: $(STAMP)
	GALLEY_CALLS_RESULT=benchmarks/results/function-calls-$(shell date +%F).md \
	  $(BIN)/python -m pytest tests/prepare/test_function_calls.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -m "not slow and not long and not sweep"

# Accept what recipes plan to now as right; look at the difference before committing it.
golden: $(STAMP)
	GALLEY_BLESS=1 $(BIN)/python -m pytest tests/launch/test_golden.py tests/launch/test_jobs.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

ifeq ($(VENV),.venv)
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "make: needs Python 3.11 or newer; say PYTHON=path" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/share/bfcl --upgrade $(CALLS)
	rm -f $(VENV)/.galley-*
	touch $@
else
# An environment that somebody else looks after: used as it is.
$(STAMP):
	@test -x $(BIN)/python || { echo "make: no environment at $(VENV); leave VENV out to make one" >&2; exit 1; }
endif
