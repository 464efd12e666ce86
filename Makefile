# Everything is installed into .venv; only make, python3 with venv, and the package registries are needed.
PYTHON ?= python3
BIN := .venv/bin
SETUP := setup.py setup.cfg pyproject.toml
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help run test lint types torch test-marabou test-install bench coverage soundness soak soak-short fuzz docs clean

help: ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

run: .venv/.run ## the main job: a simulated robot under the certified controller, 30 s over ROS 2
	@$(BIN)/laws demo

test: lint ## all checks and tests (those of training need `make torch` first)
	$(BIN)/pytest

lint: .venv/.test ## style and the import rules
	$(BIN)/ruff check .
	$(BIN)/pytest -q tests/test_import_rules.py

types: .venv/.test ## static types, strict in core (apart from `make test`: NumPy's own types differ from version to version)
	$(BIN)/mypy

torch: .venv/.run ## add PyTorch and SciPy, for training policies (on PyPI it comes with CUDA, gigabytes)
	$(BIN)/pip install --quiet --editable '.[train]' torch==2.13.0 onnxscript

coverage: .venv/.test ## the core's lines that its tests run, at least 95%
	$(BIN)/pytest -q --cov=laws_ros/core --cov-report=term-missing:skip-covered --cov-fail-under=95

test-marabou: .venv/.test ## hand small certificates to Marabou, another group's verifier (Python up to 3.11)
	-$(BIN)/pip install --quiet maraboupy
	$(BIN)/pytest -m slow tests/test_vnnlib.py

bench: .venv/.test ## what a hit and a certificate cost on this machine (two minutes)
	@$(BIN)/python benchmarks/hot_path.py
	@$(BIN)/python benchmarks/certify.py

soundness: .venv/.test ## ten million samples and 100,000 attacks over libraries of all kinds (minutes)
	$(BIN)/python benchmarks/soundness.py

soak: soak-short ## the same, and the controller's latency and its reactions to faults (a machine at rest, please)
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/faults.py

soak-short: .venv/.test ## two minutes of the controller at 100 Hz: memory, queues, emergency stops (on any machine)
	$(BIN)/python benchmarks/soak.py

fuzz: .venv/.test ## attack the bounds of random networks for four minutes
	$(BIN)/python benchmarks/fuzz.py

test-install: .venv/.test ## pip installs into fresh environments (minutes)
	$(BIN)/pytest -m slow tests/test_packaging.py

docs: .venv/.run ## the documentation as a site in docs/_build; warnings and dead links are errors
	@$(BIN)/pip install --quiet --editable '.[docs]'
	$(BIN)/sphinx-build -q -W --keep-going docs docs/_build

clean: ## remove .venv and what tools left behind
	rm -rf .venv docs/_build docs/reference build dist install log *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.run: $(SETUP)
	@echo "installing into .venv (a minute or two the first time)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --editable '.[sim,ros]'
	@touch $@

.venv/.test: .venv/.run
	@$(BIN)/pip install --quiet --editable '.[sim,gym,ros,test]'
	@touch $@
