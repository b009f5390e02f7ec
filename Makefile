# Few targets; `make` alone lists them. Everything runs in .venv, made from the lock with pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# What the tests need besides; .ci/run has it installed by something quicker.
INSTALL_TESTS ?= $(PIP)

# The tests start the service dozens of times: its modules are compiled once, not at each start.
unexport PYTHONDONTWRITEBYTECODE

# What computes with torch in the tests' own process, apart from all that asks a service: that mostly
# waits, and need not import torch first.
PYTEST := $(BIN)/pytest
TEST = $(PYTEST) -m "not gpu and not system and not full"
SYSTEM = $(PYTEST) --ignore tests/cluster --durations=15 --durations-min=5
ENGINE_TESTS := tests/engine tests/images tests/shapes tests/benchmarks tests/cli/test_doctor_files.py \
	tests/docs/test_getting_started.py tests/reliability/test_error_classification.py \
	tests/service/test_prompt_tokens.py

.PHONY: help install serve test test-engine test-service test-fast test-system test-ray coverage image-check check fmt \
	lock release clean soak bench-gpu

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

$(VENV)/.run: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.lock
	$(PIP) --no-deps --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.run requirements-test.lock
	$(INSTALL_TESTS) -r requirements-test.lock
	@touch $@

install: $(VENV)/.run ## make .venv and install from the lock what the service needs

serve: $(VENV)/.run ## install from the lock and start the service on 127.0.0.1:8000
	@$(BIN)/klein serve

test-fast: $(VENV)/.test ## tests without torch, card or network
	$(BIN)/pytest -m "not torch and not gpu and not slow and not system and not full"

test: $(VENV)/.test ## those and the end-to-end tests against a real server
	@echo "Two runs side by side; each is shown when it has ended."
	@$(MAKE) --no-print-directory --keep-going --output-sync=target \
		--jobs $(if $(filter 0,$(WORKERS)),1,2) test-engine test-service

test-engine: $(VENV)/.test ## the half that computes: the engine, pictures, the demo's tools
	$(TEST) $(ENGINE_TESTS)

test-service: $(VENV)/.test ## the half that asks services
	$(TEST) -n $(or $(WORKERS),2) --no-loadscope-reorder \
		--ignore tests/gpu $(ENGINE_TESTS:%=--ignore %)

coverage: $(VENV)/.test ## `make test` with branch coverage, child processes counted; fails under 92 %
	$(BIN)/coverage erase
	@PYTHONPATH=$(CURDIR)/tests/support/measured $(MAKE) --no-print-directory test PYTEST="$(BIN)/coverage run -m pytest"
	@$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

test-system: $(VENV)/.test ## the image, Prometheus and the long forms; installs what they call
	@tests/container/install_tools.sh
	$(INSTALL_TESTS) -r tests/browser/requirements.txt -r tests/container/requirements.txt
	@failed=0; $(SYSTEM) -n 2 --no-loadscope-reorder -m "(system or full) and not alone and not gpu" || failed=1; \
		$(SYSTEM) -m "alone and not gpu" || failed=1; \
		exit $$failed

test-ray: $(VENV)/.test ## the service under a real Ray Serve, in a network namespace; as root
	@tests/container/install_tools.sh
	@tests/cluster/install_ray.sh
	$(BIN)/pytest -m "(system or full) and not gpu" tests/cluster

image-check: $(VENV)/.test ## build the image and run the service in it, without an engine
	@tests/container/install_tools.sh
	$(RUN) tools/image_check.py $(if $(EXTRAS),--extras $(EXTRAS))

check: $(VENV)/.test ## format, lint (JavaScript too), types, import contracts, known holes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/oxlint
	$(RUN) tools/audit.py

fmt: $(VENV)/.test ## format, and mend what the linters can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/oxlint --fix

lock: ## make the lock files anew from pyproject.toml and tests/requirements.in
	$(PYTHON) tools/lock.py

release: $(VENV)/.test ## VERSION=0.2.0: wheel, sdist, SBOM, checksums, notes and tag text in dist/; sends nothing
	$(RUN) tools/release.py $(VERSION)

clean: ## remove the environment and caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage*

soak: $(VENV)/.test ## MINUTES=10 at twice the capacity with faults, kills and drains; one table, one JSON line
	$(RUN) benchmarks/soak.py --minutes $(or $(MINUTES),10)

bench-gpu: $(VENV)/.test ## measure the service on a card: one table, rows in benchmarks/results.jsonl
	$(RUN) benchmarks/bench_gpu.py $(PHASES)
