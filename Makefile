# Every target sets up what it needs; `make pretrain` and `make test` are all a newcomer types.
VENV := .venv
PYTHON := $(VENV)/bin/python
FLM := $(VENV)/bin/flm
STAMP := $(VENV)/.ready
RUN := runs/demo
PROCESSES ?= 2

.PHONY: setup pretrain test test-fast test-soak check bench report lock

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check uv
	$(VENV)/bin/uv pip sync --quiet --compile-bytecode --require-hashes requirements.lock
	$(VENV)/bin/uv pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

pretrain: setup  ## real data, a model trained with FLM, its scores and a report, in minutes on a laptop
	$(FLM) data demo data/demo
	OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --standalone --nproc-per-node $(PROCESSES) -m flm_scale train demo --run-dir $(RUN) --overwrite
	$(FLM) eval $(RUN) --task caption
	$(FLM) eval $(RUN) --task retrieval
	$(FLM) eval $(RUN) --task vqa
	$(FLM) report $(RUN)

# Without compiled files each of the tests' hundreds of processes would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

# On two cores: waits for servers leave a core idle, so tests run two or three at a time; launches of many ranks leave none.
RANKS := tests/distributed tests/test_launch.py

test: test-fast  ## everything
	$(PYTHON) -m pytest -q -n 2 --dist loadfile -m slow --durations=15 $(RANKS:%=--ignore=%)
	$(PYTHON) -m pytest -q -m slow --durations=15 $(RANKS)

test-fast: setup
	$(PYTHON) -m pytest -q -n 3 --dist loadfile -m "not slow"

test-soak: setup  ## an hour: all pairs of layouts, kill -9 on all layouts; ARGUMENTS="--trials 3 --layouts 112-zero1 --seed 1" for less
	ALL_PAIRS=1 $(PYTHON) -m pytest -q tests/distributed/test_pairs.py
	$(PYTHON) -m tests.distributed.soak $(ARGUMENTS)

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(PYTHON) -m pytest -q tests/contracts

bench: setup
	$(PYTHON) -m tools.bench
	$(PYTHON) -m tools.bench_data
	$(FLM) data demo data/demo
	OMP_NUM_THREADS=1 $(PYTHON) -m tools.bench_checkpoints
	for processes in 2 4; do OMP_NUM_THREADS=1 $(PYTHON) -m torch.distributed.run --standalone --nproc-per-node=$$processes -m tools.bench_layouts; done

report: setup
	$(FLM) report $(RUN)

lock:  ## after a change of dependencies in pyproject.toml
	$(VENV)/bin/uv pip compile --quiet --generate-hashes --no-annotate --no-header --extra dev --python-version 3.11 \
		--constraint tools/pins.txt pyproject.toml --output-file requirements.lock
