# make bench, make test: both set up .venv first, from the pinned constraints.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

$(VENV)/ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[test,bench,examples,dev]"
	touch $@

$(VENV)/ready-full: $(VENV)/ready
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[trl]"
	touch $@

setup: $(VENV)/ready

bench: setup
	$(RUN) -m benchmarks

test: setup
	$(RUN) -m pytest

test-full: $(VENV)/ready-full
	$(RUN) -m pytest --full

# Both within 11 minutes on an H100. Where nothing can be installed, with a Python that has PyTorch,
# Triton and pytest and in which this package is installed: make test-gpu GPU_RUN=python3
GPU_RUN ?= $(RUN)

test-gpu: $(if $(filter $(RUN),$(GPU_RUN)),setup)
	status=0; \
	$(GPU_RUN) -m benchmarks.gpu.check || status=1; \
	$(GPU_RUN) -m benchmarks.gpu.measure || status=1; \
	exit $$status

static: setup
	$(RUN) -m benchmarks.static

report: setup
	$(RUN) -m benchmarks.report --readme README.md --page docs/benchmarks.md --methods docs

accuracy: setup
	$(RUN) -m benchmarks.accuracy

mutants: setup
	$(RUN) -m tests.support.mutants

check: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

.PHONY: example-mode-seeking
example-mode-seeking: setup
	$(RUN) examples/mode_seeking.py

example: setup
	$(RUN) examples/distill_text.py

example-offline: setup
	$(RUN) examples/offline_teacher.py

# On two cores eight minutes a seed; the committed results: make example-minillm SEEDS=3
SEEDS ?= 1

example-minillm: setup
	$(RUN) examples/minillm.py --seeds $(SEEDS)

# About five minutes a seed on two cores; for results: make example-system2 SEEDS=3
.PHONY: example-system2
example-system2: setup
	$(RUN) examples/system2.py --seeds $(SEEDS)

.PHONY: example-tensor-parallel
example-tensor-parallel: setup
	$(RUN) -m torch.distributed.run --nproc-per-node 2 examples/tensor_parallel.py

.PHONY: setup bench test test-full test-gpu static report accuracy mutants check example example-offline example-minillm
