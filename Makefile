# fanin's shortcuts. `make help` lists them.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
# What an MLflow client or DVC would do unasked: not here.
export DVC_NO_ANALYTICS = 1
export MLFLOW_DISABLE_TELEMETRY = true
export TOKENIZERS_PARALLELISM = false
export UV_SYSTEM_CERTS ?= true
# dvc exp run makes commits of its own; where git knows no user, any name will do.
export GIT_AUTHOR_NAME ?= $(or $(shell git config user.name),fanin)
export GIT_AUTHOR_EMAIL ?= $(or $(shell git config user.email),fanin@localhost)
export GIT_COMMITTER_NAME ?= $(GIT_AUTHOR_NAME)
export GIT_COMMITTER_EMAIL ?= $(GIT_AUTHOR_EMAIL)
export PATH := $(abspath $(BIN)):$(PATH)
PIPELINE := $(PY) -m fanin.tracking run -- dvc repro

.DEFAULT_GOAL := help
.PHONY: help setup demo train evaluate memory plan report compare study-page rivals ui sync params test test-slow lint gpu-check lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## make the environment (.venv) from requirements.lock

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fanin needs Python 3.11 or later, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check "$(TORCH)" uv
	$(BIN)/uv pip install -q --python $(PY) -r requirements.lock
	$(BIN)/uv pip install -q --python $(PY) --no-deps -e .
	touch $@

demo: setup ## the whole pipeline on the bundled WordNet, then a short second run to compare with
	$(PIPELINE)
	$(PY) -m fanin.tracking run -- dvc exp run --temp --force -q --name short-random-start $(SECOND)
	$(PY) -m fanin.tracking.compare
	@echo
	@echo "the page:     reports/report.html"
	@echo "the two runs: make ui"

# The second run of the demo: a tenth of the steps, features drawn at random, so that the start from data has a rival.
SECOND := -S start.source=random -S head.lexical=0 -S rewiring.recode_at=0 -S train.max_steps=80 -S train.validate_every=0 -S evaluate.documents=4000

train: setup ## train (and whatever it needs first)
	$(PIPELINE) train

evaluate: setup ## evaluate the trained model on the test set
	$(PIPELINE) evaluate

memory: setup ## predicted and measured memory, beside a dense layer
	$(PIPELINE) memory

plan: setup ## does it fit? before a run: make plan ARGS="--memory 24GiB --labels 670091" (--help: all it answers)
	@$(PY) -m fanin.memory plan $(ARGS)

report: setup ## everything, to the HTML page reports/report.html
	$(PIPELINE)

compare: setup ## two runs: RUNS="name-or-id ..."; the study: CORPUS=near BUDGET=30m [SEEDS=3] [METHODS="main rivals"]
ifdef CORPUS
	$(PY) -m study $(CORPUS) $(if $(BUDGET),--budget $(BUDGET)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(METHODS),--methods "$(METHODS)") $(ARGS)
else
	$(PY) -m fanin.tracking.compare $(RUNS)
endif

study-page: setup ## renew the tables and plots in docs/study.md from benchmarks/results/
	$(PY) -m study.page

# Each rival by itself: one that cannot be had (some are built from source) does not keep the others out.
RIVALS ?= omikuji==0.5.2 napkinxc==0.7.2 libpecos==1.2.8
rivals: .venv-rivals/.installed ## the rivals' environment (.venv-rivals), for the study

.venv-rivals/.installed: study/rivals/requirements.txt
	$(PYTHON) -m venv .venv-rivals
	.venv-rivals/bin/pip install -q --disable-pip-version-check -r $<
	@for rival in $(RIVALS); do \
		.venv-rivals/bin/pip install -q --disable-pip-version-check --no-deps $$rival || echo "$$rival cannot be had; the study goes on without it"; \
	done
	touch $@

ui: setup ## the MLflow UI on this project's runs
	$(PY) -m fanin.tracking ui

sync: setup ## send to MLflow what could not be sent before
	$(PY) -m fanin.tracking sync

params: setup ## the settings in force: params.yaml over its preset over the defaults
	$(PY) -m fanin.config

# A module's tests mostly share a worker, and so what the module made for them; a worker takes about 1 GiB.
PARALLEL := -n logical --maxprocesses 8 --dist worksteal

test: setup ## the fast tests, on a CPU
	$(PY) -m pytest $(PARALLEL)

test-slow: setup ## the slow tests too
	$(PY) -m pytest $(PARALLEL) -m 'not gpu'

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-check: ## on a GPU machine: the GPU tests; records go to $$OUT (default benchmarks/results)
	$(PYTHON) benchmarks/gpu_check.py

lock: setup ## renew requirements.lock from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --extra dev --extra triton -q --no-header --no-annotate -o .lock.tmp
	(head -1 requirements.lock; grep -vE '^(torch==|nvidia-|cuda-)' .lock.tmp) > .lock.new && rm .lock.tmp && mv .lock.new requirements.lock

clean: ## remove what the pipeline made (not the environment, not MLflow's runs)
	rm -rf data/corpus data/tokens data/embeddings data/clusters data/start models checkpoints
	rm -f reports/report.html reports/predictions.parquet
