# Every target makes the environment it needs; `make help` lists them.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(READY): requirements.lock pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(VENV)/bin/uv pip sync --quiet --compile-bytecode --python $(RUN) requirements.lock
	$(VENV)/bin/uv pip install --quiet --python $(RUN) --no-deps --no-build-isolation --editable .
	touch $(READY)

install: $(READY) ## make the environment in .venv

browser: ## headless Chromium for the tests of the page (Debian, as root)
	command -v chromium-headless-shell || { apt-get update --quiet && \
	apt-get install --quiet --yes --no-install-recommends chromium-headless-shell; }

demo: $(READY) ## simulated exams and one real cine through every job
	$(RUN) -m ray_jobs.demo

serve: $(READY) ## serve the demo's checkpoint and print a curl that works
	$(RUN) -m ray_jobs.demo_server

test: $(READY) ## the tests that take minutes at most
	$(RUN) -m pytest -m "not slow"

test-slow: $(READY) ## the tests that take longer
	$(RUN) -m pytest -m slow

test-all: $(READY) ## all tests, as CI runs them
	$(RUN) -m pytest

lint: $(READY) ## style, import rules
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

format: $(READY) ## put the code into shape
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

type: $(READY) ## strict types
	$(VENV)/bin/mypy

check: lint type test ## what a change must pass

backbones: $(READY) ## train the shipped tiny backbones anew
	$(RUN) -m ultra.train.tiny_backbones

lock: $(READY) ## resolve the dependencies anew
	$(VENV)/bin/uv pip compile pyproject.toml --extra dev --extra ocr --no-emit-index-url --quiet --output-file requirements.lock

.PHONY: help install browser demo serve test test-slow test-all lint format type check backbones lock
