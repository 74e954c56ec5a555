PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
DPOPT := $(VENV)/bin/dpopt
READY := $(VENV)/.ready

help:  ## show this list
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY)  ## create .venv and install everything that was tested together

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "dpopt needs Python 3.11 to 3.13: make PYTHON=python3.12 ...")'
	@echo "installing PyTorch and what else is tested together into $(VENV): about 6 GB, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## train DP-MicroAdam on digits at ε = 8 and show the result
	$(DPOPT) train experiment=quickstart

test: $(READY)  ## run the tests, a process per core (no network, no GPU needed)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4

test-fast: $(READY)  ## the tests without those that take seconds
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4 -m "not slow"

test-floors:  ## the tests on the oldest packages that pyproject.toml admits, in an environment of their own (6 GB)
	$(PYTHON) -m venv $(VENV)-floors
	sed -n '/^dependencies/,$$p' pyproject.toml | grep -oE '"[a-z-]+>=[0-9.]+' | tr -d '"' | sed 's/>=/==/' >$(VENV)-floors/floors.txt
	$(VENV)-floors/bin/pip install --quiet --constraint $(VENV)-floors/floors.txt --editable '.[dev]'
	OMP_NUM_THREADS=1 $(VENV)-floors/bin/python -m pytest -q -n auto --maxprocesses 4 -o filterwarnings=default

lint: $(READY)  ## ruff and mypy
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

docs: $(READY)  ## build the documentation: site/index.html, which needs no server and no network
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: $(READY)  ## time and memory of optimizers and gradients, side by side (wants a quiet machine)
	$(PY) scripts/bench_optim.py
	$(PY) scripts/bench_engine.py

audit: $(READY)  ## audit the code and wrong versions of it with canaries, in minutes: experiments/results/audit
	$(PY) scripts/audit_mutants.py

KILLS ?= 200
soak: $(READY)  ## kill runs at random moments, KILLS=200 times over one and two ranks, and compare bits: an hour or two
	$(PY) scripts/soak.py $(KILLS)

SIZE ?= cpu
ifneq ($(and $(SCALE),$(filter tables table-% plan-%,$(MAKECMDGOALS))),)
$(error SCALE is now SIZE: make $(MAKECMDGOALS) SIZE=$(SCALE))
endif
# A process per GPU, or per core where there is none.
JOBS ?= $(shell gpus=$$(nvidia-smi -L 2>/dev/null | wc -l); [ $$gpus -gt 0 ] && echo $$gpus || nproc)
TABLE = $(DPOPT) table --size $(SIZE)
RUN_TABLES = OMP_NUM_THREADS=1 $(TABLE) --run --jobs $(JOBS)

tables: $(READY)  ## run what is missing of all tables, SIZE=smoke|cpu|full, in JOBS processes, and write them
	$(RUN_TABLES)

table-%: $(READY)  ## the same for one table of experiments/
	$(RUN_TABLES) $*

plan-%: $(READY)  ## estimate a table on this machine: runs, time, memory
	$(TABLE) $* --plan

rerun: $(READY)  ## train a run again, RUN=runs/NAME, and say whether the result agrees
	$(DPOPT) rerun $(RUN)

.PHONY: help setup demo test test-fast test-floors lint docs bench audit soak tables rerun
.DEFAULT_GOAL := help
