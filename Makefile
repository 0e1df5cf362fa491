# Every target works on a fresh machine by itself: it sets up what is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := pytest
# As many tests at once as there are cores, up to four. The tests of a file share fixtures and stay together; files in
# their order, because those with few tests run longest and would else come last, alone.
WORKERS := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
DONE := $(VENV)/.done

.PHONY: help setup demo test soak chaos check proto bench docs bundle advisories clean

help:  ## What there is to make
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(DONE)  ## Create .venv with everything, at the versions of deploy/constraints.txt

$(DONE): pyproject.toml deploy/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint deploy/constraints.txt --editable '.[dev]'
	touch $(DONE)

demo: $(DONE)  ## Four hospitals train one model under differential privacy, as real processes over TLS
	$(BIN)/konsil-coordinator demo $(ARGS)

test: $(DONE)  ## The test suite, without the long runs, on every core
	$(BIN)/$(PYTEST) $(WORKERS) -m 'not soak' $(ARGS)

soak: $(DONE)  ## The long runs
	$(BIN)/pytest -m soak $(ARGS)

chaos: $(DONE)  ## Studies of 30 rounds under kills, stops and broken networks (needs root)
	$(BIN)/pytest -m soak tests/rounds/test_chaos.py -s $(ARGS)

check: $(DONE)  ## Format, lint, types, import rules and tests with coverage
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/coverage erase
	$(MAKE) test PYTEST='coverage run -m pytest'
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

proto: $(DONE)  ## Generate the control service's Python from shared_models/control/control.proto
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. shared_models/control/control.proto

bench: $(DONE)  ## The benchmarks; each prints ratios measured in one run (make bench ARGS=bench/round_latency.py)
	@for script in $(or $(ARGS),$(wildcard bench/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

docs: $(DONE)  ## The documentation's site, in build/site
	$(BIN)/python deploy/site/build.py build/site

bundle: $(DONE)  ## What a role installs without a network (make bundle ROLE=hospital-cpu, docs/install.md)
	$(BIN)/python deploy/bundle/build.py $(or $(ROLE),all) $(ARGS)

advisories: $(DONE)  ## Known vulnerabilities of the pinned versions, offline (make advisories DB=all.zip, docs/install.md)
	$(BIN)/python deploy/advisories.py $(DB) $(ARGS)

clean:  ## Remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache konsil-demo konsil-simulation
