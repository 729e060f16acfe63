# One word for each chore; `make` alone lists them. Everything happens in .venv, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNNABLE := $(VENV)/.runnable
INSTALLED := $(VENV)/.installed
BENCH_INSTALLED := $(VENV)/.installed-bench
RELEASE_INSTALLED := $(VENV)/.installed-release
# Node's packages are those of the tests that generate clients, and of the linters of the OpenAPI document.
CLIENTS := tests/clients
CLIENTS_INSTALLED := $(CLIENTS)/node_modules/.package-lock.json
MARKDOWNLINT := $(CLIENTS)/node_modules/.bin/markdownlint-cli2
# LOCK=requirements.lock installs exactly what the image holds (CI does), instead of the newest that setup.cfg allows.
LOCK ?=
# setuptools warns of every editable installation, whatever its layout.
INSTALL := PYTHONWARNINGS='ignore:Editable installation' $(BIN)/pip install --quiet --disable-pip-version-check

# The other Pythons that are supported; each gets an environment of its own, .venv-3.X.
PYTHONS ?= python3.12 python3.13 python3.14
# How long the installation for one of them may take, and how long its tests, in seconds.
PYTHONS_TIMEOUT_S ?= 240

# Much of what a test does is waiting, so there are three times as many workers as processors (tests/conftest.py). All tests
# of a file run in one worker, which starts what they share (a browser, an app) once; the longest files come first.
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder

# Tests that run on PostgreSQL as well; which of them are about SQLite's file is said in them.
BOTH_ENGINES := tests/contract tests/guide tests/mcp $(addprefix tests/test_,$(addsuffix .py,alerts certificates changes events exports feed filters \
	properties queries regressions runs stats tail tokens upkeep))

.DEFAULT_GOAL := help
.PHONY: help install run test test-contract test-postgresql test-pythons test-all test-faults test-failover test-packages torture fuzz check bench bench-large bench-client schema docs lock audit sbom build deb clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(RUNNABLE): setup.cfg pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.11 …"; exit 1; }
	@echo "Installing telemetryd into $(VENV)/ (once, about half a minute) …"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) --upgrade pip
	@$(if $(LOCK),$(INSTALL) --require-hashes --requirement $(LOCK),true)
	@$(INSTALL) --editable .
	@touch $@

$(INSTALLED): $(RUNNABLE)
	@echo "Installing what tests and checks need into $(VENV)/ (once, about a minute) …"
	@$(INSTALL) --editable '.[dev]'
	@touch $@

$(CLIENTS_INSTALLED): $(CLIENTS)/package.json $(CLIENTS)/package-lock.json
	@if command -v npm >/dev/null; then \
		echo "Installing what generates and lints clients of the API into $(CLIENTS)/node_modules/ (once, some 10 s) …"; \
		cd $(CLIENTS) && npm ci --ignore-scripts --no-audit --no-fund --silent && touch node_modules/.package-lock.json; \
	else echo "Without npm no TypeScript client is tested, and the OpenAPI document is not linted"; fi

install: $(RUNNABLE) ## set up what the daemon needs

run: $(RUNNABLE) ## set up what the daemon needs, and run it on port 8765
	$(BIN)/telemetryd serve

test: $(INSTALLED) $(CLIENTS_INSTALLED) ## set everything up and run the tests (about five minutes on two processors)
	$(BIN)/pytest $(PARALLEL) -m "not slow and not faults and not postgresql"

test-postgresql: $(INSTALLED) ## run the tests of PostgreSQL's engine, and on it those that are the same for both
	$(BIN)/pytest $(PARALLEL) -m "not slow and not faults" --engine postgresql $(wildcard tests/test_postgres_*.py) tests/test_sql.py $(BOTH_ENGINES)

test-pythons: ## pass the contract tests on each other Python that is here (PYTHONS names them)
	@for python in $(PYTHONS); do \
		if ! $$python -c '' 2>/dev/null; then echo "test-pythons: skipped $$python, which is not installed"; continue; fi; \
		echo "test-pythons: the contract tests on $$python"; \
		venv=.venv-$${python#python}; \
		for goal in $$venv/.installed test-contract; do \
			timeout --kill-after=10 $(PYTHONS_TIMEOUT_S) $(MAKE) --no-print-directory PYTHON=$$python VENV=$$venv $$goal \
				|| { status=$$?; echo "test-pythons: failed on $$python (124: not done within $(PYTHONS_TIMEOUT_S) s): $$status"; exit $$status; }; \
		done; \
	done

test-contract: $(INSTALLED)
	$(BIN)/pytest $(PARALLEL) -m "not slow" tests/contract

test-all: $(INSTALLED) $(CLIENTS_INSTALLED) ## the tests, the slow suites, and a tenth of `make torture`
	$(BIN)/pytest --rounds-scale 0.1

test-faults: $(INSTALLED) ## the fault tests alone, in their short form (a minute and a half)
	$(BIN)/pytest $(PARALLEL) -m "not slow and faults"

test-failover: $(INSTALLED) ## kill PostgreSQL's servers under Patroni, two rounds in each mode; with ROUNDS=1 all of them (needs postgresql-15 and etcd-server)
	$(BIN)/pytest tests/faults/test_failover.py --rounds-scale $(or $(ROUNDS),0.001)

test-packages: $(INSTALLED) ## build, install, upgrade, remove and purge the .deb, and build the image, on a Debian (root; DEBIAN names the release)
	$(BIN)/pytest -m packages tests/packages

torture: $(INSTALLED) ## the fault tests in their long form; publishes the figures in docs/explanation/reliability.md (two to three hours)
	rm -f build/ledger.jsonl && mkdir -p build
	$(BIN)/pytest tests/faults tests/contract/test_bad_input.py --rounds-scale 1 --ledger build/ledger.jsonl
	$(BIN)/python -m tests.tools.reliability build/ledger.jsonl

fuzz: $(INSTALLED) ## ten minutes of coverage-guided fuzzing of each parser (Linux); new inputs go into tests/fuzz/corpus
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz body -max_total_time=600
	$(BIN)/python -m tests.fuzz query -max_total_time=600
	$(BIN)/python -m tests.fuzz handshake -max_total_time=600
	$(BIN)/python -m tests.fuzz records -max_total_time=600
	$(BIN)/python -m tests.fuzz token_file -max_total_time=600
	$(BIN)/python -m tests.fuzz message -max_total_time=600

check: $(INSTALLED) $(CLIENTS_INSTALLED) ## lint, types, the direction of imports, spelling, Markdown, and the OpenAPI document
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell -D - -D tests/tools/words.txt
	$(BIN)/python -m tests.tools.clients
	@if [ -x $(MARKDOWNLINT) ]; then $(MARKDOWNLINT); else echo "Without npm the Markdown is not checked"; fi

$(BENCH_INSTALLED): $(INSTALLED)
	@echo "Installing what benchmarks need into $(VENV)/ (once) …"
	@$(INSTALL) --editable '.[bench]'
	@touch $@

bench: $(BENCH_INSTALLED) ## measure against limits, a baseline and the targets, and write them into the docs (ten minutes; needs wrk and gcc)
	$(BIN)/python -m bench
	$(BIN)/python -m tests.tools.docs

bench-large: $(BENCH_INSTALLED) ## the same with 10 million runs, where size matters (up to an hour; 15 GB of disk)
	$(BIN)/python -m bench --large
	$(BIN)/python -m tests.tools.docs

bench-client: $(INSTALLED) ## measure the client: cost of a call, memory while the daemon is down
	$(BIN)/python -m bench.agent

schema: $(INSTALLED) ## write schema/telemetry.sql from migrations/
	$(BIN)/python -m tests.tools.schema

docs: $(INSTALLED) ## write the generated parts of README.md, docs/ and .env.example
	$(BIN)/python -m tests.tools.docs

$(RELEASE_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[release]'
	@touch $@

lock: $(RELEASE_INSTALLED) ## write requirements.lock: every package that is installed with us, with its hashes
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade \
		--extra postgresql --custom-compile-command 'make lock' --output-file requirements.lock setup.cfg

audit: $(RELEASE_INSTALLED) ## look for published advisories on what requirements.lock holds
	$(BIN)/python -m tests.tools.audit

sbom: $(RELEASE_INSTALLED) ## write dist/telemetryd.cdx.json, the bill of materials (CycloneDX)
	mkdir -p dist
	$(BIN)/cyclonedx-py requirements --output-reproducible --output-file dist/telemetryd.cdx.json requirements.lock

# What is built is the last commit, with modes and times of its own, so that the same commit gives the same bytes.
build: $(INSTALLED) ## build the wheel of the last commit into dist/, with the same bytes each time
	$(BIN)/python -m tests.tools.source dist

deb: ## build the Debian package of the last commit into dist/, for this machine's release (needs debhelper, python3-venv)
	rm -rf build/deb && mkdir -p build/deb/telemetryd dist
	git -c tar.umask=0022 archive HEAD | tar --extract --same-permissions --directory build/deb/telemetryd
	cd build/deb/telemetryd && SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) dpkg-buildpackage --build=binary --no-sign
	cp build/deb/*.deb dist/

clean: ## remove the virtual environment and build leftovers
	rm -rf $(VENV) .venv-3.* $(CLIENTS)/node_modules build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
