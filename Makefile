# Everything a person does with the project. `make help` lists the targets.
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.developed
UV := $(VENV)/lock/bin/uv
UPGRADE ?= --upgrade
LOCK = UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes $(UPGRADE)
# The first Python that is new enough; PYTHON=… overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: develop lock audit
.PHONY: help install run test test-pythons check format lint types sql schema test-completion test-openai docs migrate convert-0.1 service chaos month fuzz bench bench-growth

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Everything is installed from the lock files in requirements/, whose hashes pip verifies: the same packages here, in CI and in production.
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --require-hashes

install: $(STAMP) ## make .venv and install what the service needs to run

$(STAMP): requirements/build.txt requirements/run.txt setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "GPTutor needs Python 3.11 or newer, and none was found. Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Making $(VENV) with $(PYTHON) and installing (half a minute, once) …"
	@$(PYTHON) -m venv $(VENV) || { echo "The venv module is missing. On Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@$(PIP) -r requirements/build.txt
	@$(PIP) -r requirements/run.txt
	@$(BIN)/python -m pip --disable-pip-version-check install -qq --no-deps --no-build-isolation --editable .
	@touch $@

develop: $(TOOLS) ## install what tests, lint, types and the audit need as well

$(TOOLS): requirements/develop.txt $(STAMP)
	@echo "Installing what tests and checks need (once) …"
	@$(PIP) -r requirements/develop.txt
	@touch $@

# These need more than the service does.
test check format lint types sql schema audit test-completion test-openai chaos month fuzz: develop
check: audit

lock: ## renew the lock files in requirements/ from the ranges in setup.cfg; UPGRADE= keeps the versions that still fit
	@test -x $(UV) || { $(PYTHON) -m venv $(dir $(UV)).. && $(dir $(UV))python -m pip --disable-pip-version-check install -qq 'uv>=0.13,<1'; }
	@$(LOCK) requirements/build.in -o requirements/build.txt
	@$(LOCK) setup.cfg -o requirements/run.txt
	@$(LOCK) setup.cfg --extra test --extra dev -c requirements/run.txt -o requirements/develop.txt
	@$(LOCK) setup.cfg --extra bench -c requirements/run.txt -c requirements/develop.txt -o requirements/bench.txt

audit: ## check the locked packages for known vulnerabilities; passes, and says so, where the vulnerability service is unreachable
	@$(BIN)/python requirements/audit.py

run: install ## the whole service: embedded PostgreSQL and the OpenRouter simulator where nothing else is configured
	@exec $(BIN)/gptutor serve

# Each process has a PostgreSQL of its own; a process without tests left takes some from the others. Most tests wait more than they
# compute, so there are two processes for each core, and at most 16: each PostgreSQL takes memory.
PARALLEL = --numprocesses=$(shell $(PYTHON) -c 'import os; print(min(16, 2 * (os.cpu_count() or 1)))') --dist=worksteal
# Tests start Python a hundred times: the bytecode is kept, even where the environment says otherwise.
test check test-pythons month: export PYTHONDONTWRITEBYTECODE :=

test: install ## all tests, on a real PostgreSQL; some of them with pytest's arguments: T=tests/test_bill.py, T="-k retry -x"
	@$(BIN)/python -m pytest $(or $(T),$(PARALLEL))

test-pythons: ## all tests with each Python from 3.11 to 3.14 that is found, in an environment of its own below var/
	@for version in 3.11 3.12 3.13 3.14; do \
		command -v python$$version >/dev/null || { echo "Python $$version is not on PATH: skipped."; continue; }; \
		echo "Python $$version"; \
		$(MAKE) --no-print-directory test PYTHON=python$$version VENV=var/python$$version T='$(or $(T),$(PARALLEL))' || exit 1; done

check: install lint types sql ## lint, types, SQL, tests, and that every branch of the money is tested: what a change must pass
	@$(BIN)/python -m pytest $(PARALLEL) --cov=gptutor.money --cov=gptutor.openrouter.bill --cov=gptutor.openrouter.retry --cov-branch \
		--cov-report=term-missing:skip-covered --cov-fail-under=100

format: install ## format the code
	@$(BIN)/ruff format .

lint: install
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: install
	@$(BIN)/mypy

sql: install
	@$(BIN)/sqlfluff lint --disable-progress-bar sql

schema: ## renew sql/schema.sql from the migrations and functions
	@$(BIN)/python -m tests.support.schema

test-completion: install ## chat completions, plain and streamed, against a running gateway of its own
	@$(BIN)/python -m pytest -v tests/test_completion.py

test-openai: install ## the OpenAI SDKs for Python and JavaScript against a running gateway of its own
	@$(BIN)/python -m pytest -v tests/test_openai.py

chaos: install ## real processes killed at random, then our books against OpenRouter's bill: SECONDS=240 SEED=7 KILLS=200 CRASHES=20
	@exec $(BIN)/python -m tests.chaos --seconds $(or $(SECONDS),60) --kills-at-least $(or $(KILLS),30) \
		--crashes-at-least $(or $(CRASHES),2) $(if $(SEED),--seed $(SEED))

month: install ## an operator's month under load: installed, replaced, updated, taken back, broken, restored: SECONDS=240 REPLACEMENTS=20
	@exec $(BIN)/python -m tests.month --seconds $(or $(SECONDS),60) --replacements $(or $(REPLACEMENTS),5)

fuzz: install ## bytes that nobody meant, for each of what reads bytes: SECONDS=60 each
	@for target in scanner request key vk config models; do \
		$(BIN)/python -m tests.fuzz $$target --seconds $(or $(SECONDS),60) || exit 1; done

BENCHED := $(VENV)/.bench-installed
$(BENCHED): requirements/bench.txt $(STAMP)
	@$(PIP) -r requirements/bench.txt
	@touch $@

bench: $(BENCHED) ## CPU per request against a bare relay, nginx and LiteLLM, in one run (bench/README.md): ARGS="--tls --rounds 5"
	@mkdir -p var && exec $(BIN)/python -m bench --json var/bench.json --chart var/bench.png $(ARGS)

bench-growth: $(BENCHED) ## the cost of a hold and its settlement with 1 million accounts and 10 million entries: ARGS="--rows 1000000"
	@exec $(BIN)/python -m bench.growth $(ARGS)

docs: install ## the documentation at http://localhost:8080
	@exec $(BIN)/gptutor docs

convert-0.1: install ## convert the database of GPTutor 0.1 to the schema of 0.2 (stop the service and make a backup first)
	@$(BIN)/python deploy/convert-0.1.py

migrate: install ## bring the database of DATABASE_URL up to date
	@$(BIN)/gptutor migrate

# As root only where that is needed: .venv stays the caller's own.
SUDO ?= $(if $(filter 0,$(shell id -u)),,sudo)

service: install ## install this version as a systemd service, or bring it up to date: ARGS=--dry-run, ARGS="--release 0.2.0"
	@$(SUDO) $(CURDIR)/$(BIN)/gptutor install-service $(ARGS)
