# `make demo` and `make test` each work on a fresh machine: they make .venv, install pinned versions, and run.
# Another Python: make demo PYTHON=python3.12.   Another place for the environment: make demo VENV=/path.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format docs method-docs pins bench clean

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
JOBS ?= 2
CHECKED = src tests scripts benchmarks

# Stamps: a second call finds them up to date and installs nothing; a changed pin installs again.
MADE = $(VENV)/.stamp-made
RUN = $(VENV)/.stamp-run
TEST = $(VENV)/.stamp-test
DOCS = $(VENV)/.stamp-docs

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

demo: $(RUN)  ## scan and clean the backdoored model that comes with bezoar; the report is demo-report/report.html
	$(VENV)/bin/bezoar demo --out demo-report

test: $(TEST)  ## run all tests but the slow ones; options: make test ARGS="-k name -m slow"
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(TEST)  ## check format (ruff), rules (ruff) and types (mypy --strict)
	$(VENV)/bin/ruff format --check $(CHECKED)
	$(VENV)/bin/ruff check $(CHECKED)
	$(VENV)/bin/mypy --strict

format: $(TEST)  ## rewrite the code in the format that lint wants
	$(VENV)/bin/ruff format $(CHECKED)
	$(VENV)/bin/ruff check --fix $(CHECKED)

docs: $(DOCS) method-docs  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

method-docs: $(RUN)  ## write docs/methods/ from the docstrings
	$(VENV)/bin/python scripts/make_method_docs.py

pins: $(MADE)  ## resolve requirements/*.txt anew from pyproject.toml
	$(VENV)/bin/python scripts/pin.py

bench: $(TEST)  ## run the measurements behind docs/results.md (hours); options: make bench ARGS="--list"
	$(VENV)/bin/python benchmarks/run.py $(ARGS)

clean:  ## remove what was built; .venv stays
	rm -rf build dist site demo-report .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(MADE):
	@test -n "$(PYTHON)" || { echo "bezoar needs Python 3.11 or newer, and found none: install it," \
		"or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is older than Python 3.11 or does not start: name a newer one:" \
		"make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make an environment: install its venv module" \
		"(Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(RUN): requirements/run.txt pyproject.toml | $(MADE)
	$(PIP) install --quiet --requirement requirements/run.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(TEST): requirements/test.txt scripts/torchvision_cpu_stub.py $(RUN)
	$(PIP) install --quiet --requirement requirements/test.txt
	@$(VENV)/bin/python scripts/torchvision_cpu_stub.py || \
		echo "torchvision stays unusable beside this torch: the tests that need it will be skipped" >&2
	@touch $@

$(DOCS): requirements/docs.txt $(RUN)
	$(PIP) install --quiet --requirement requirements/docs.txt
	@touch $@
