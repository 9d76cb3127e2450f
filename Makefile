# make help lists the targets. NAME=value words go on to `python -m compdiff.run`, which also works without make.
.DEFAULT_GOAL := help
SHELL := /bin/sh

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=

ifeq ($(strip $(VENV)),)
  PY := $(PYTHON)
  READY :=
  APP_READY :=
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.compdiff-ready
  APP_READY := $(VENV)/.compdiff-app-ready
endif

.PHONY: help paper smoke plan skeleton test notebooks lab app base bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s  %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  make paper DATASETS=nih DATA_ROOT=<folder>    real data instead of phantoms'
	@echo '  make paper DATASETS=cardiac                   cardiac MRI phantoms; with DATA_ROOT=<folder>: Sunnybrook'
	@echo '  make paper SEEDS="0 1 2" STEPS=500            any setting of compdiff/config.py, in capitals'
	@echo '  PYTHON=<python> PIP_ARGS=<for pip>            which Python makes .venv, and how pip installs'
	@echo '  VENV=<folder>   or   VENV=                    another environment; empty = PYTHON as it is, install nothing'

paper: $(READY) ## the papers' tables and figures: every notebook whose inputs changed
	@$(PY) -m compdiff.run paper $(MAKEOVERRIDES)

smoke: $(READY) ## all notebooks at the smallest size, into runs/smoke
	@$(PY) -m compdiff.run smoke $(MAKEOVERRIDES)

plan: $(READY) ## what `make paper` would run, and why
	@$(PY) -m compdiff.run plan $(MAKEOVERRIDES)

skeleton: $(READY) ## drawn images in a real dataset's layout, to rehearse: DATASETS=mimic DATA_ROOT=<folder>
	@$(PY) -m compdiff.run skeleton $(MAKEOVERRIDES)

test: $(READY) $(APP_READY) ## all tests, and every notebook checked cell by cell
	@RUNS=$$(mktemp -d) && export RUNS && trap 'rm -rf "$$RUNS"' EXIT && \
	  OMP_NUM_THREADS=1 $(PY) -m pytest tests notebooks --nbval-lax --nbval-current-env -n 2

notebooks: $(READY) ## run the committed notebooks again, in place, at smoke size (after a change that their outputs show)
	@RUNS=$$(mktemp -d) && export RUNS && trap 'rm -rf "$$RUNS"' EXIT && $(PY) -m nbconvert --to notebook --execute --inplace --log-level=WARN notebooks/*.ipynb

lab: $(READY) ## JupyterLab on this machine only, in notebooks/
	@$(PY) -m jupyterlab --ip=127.0.0.1 --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks

app: $(READY) $(APP_READY) ## a page to ask the trained models for images, on this machine only
	@$(PY) -m compdiff.app $(MAKEOVERRIDES)

base: $(READY) ## train the tiny base model anew (compdiff/tiny_base)
	@$(PY) -m compdiff.base

bench: $(READY) ## time the steps of a run beside plain baselines (a quarter of an hour on two cores)
	@$(PY) benchmarks/bench.py
	@$(PY) benchmarks/bench_metrics.py

clean: ## remove runs/smoke and caches; says what it leaves
	@if command -v $(PY) >/dev/null 2>&1; then $(PY) -m compdiff.run clean $(MAKEOVERRIDES); \
	  else echo "nothing to clean: no $(VENV)"; fi

ifneq ($(READY),)
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: PYTHON=<path>")'
	@echo "Setting up $(VENV) from requirements.txt: 1 to 5 minutes, 2 GB, once"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet $(PIP_ARGS) -r requirements.txt
	@$(PY) -m pip install --quiet $(PIP_ARGS) --no-deps -e .
	@touch $@

$(APP_READY): requirements-app.txt $(READY)
	@$(PY) -m pip install --quiet $(PIP_ARGS) --no-deps -r requirements-app.txt
	@touch $@
endif
