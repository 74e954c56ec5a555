PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

help:  ## show this list
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY)  ## create .venv and install everything that was tested together

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "dpopt needs Python 3.11 to 3.13: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## train DP-MicroAdam on digits at ε = 8 and show the result
	$(RUN) run.py +experiment=quickstart

test: $(READY)  ## run the tests, a process per core (no network, no GPU needed)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 4

lint: $(READY)  ## ruff and mypy
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(READY)  ## time and memory of optimizers and gradients, side by side (wants a quiet machine)
	$(RUN) scripts/bench_optim.py
	$(RUN) scripts/bench_engine.py

JOBS ?= $(shell nproc)
table-%: $(READY)  ## run what is missing of experiments/%.yaml, JOBS processes at once, and write its table
	-$(RUN) scripts/make_tables.py $* --commands | OMP_NUM_THREADS=1 xargs -P $(JOBS) -I{} sh -c '{} >/dev/null'
	$(RUN) scripts/make_tables.py $*

.PHONY: help setup demo test lint bench
.DEFAULT_GOAL := help
