# Needs python3.11 (or newer), make, and pip's default index. Everything that is installed lies in .venv.

PYTHON ?= python3
ARGS ?=
VENV := .venv
READY := $(VENV)/.installed
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all fuzz chaos check extras clean

help:
	@echo "make setup     only set up $(VENV); the targets below do so too, if need be"
	@echo "make train     train gpt_text on two learners; ARGS='key=value ...' changes the recipe"
	@echo "make test      the tests, without the slow ones"
	@echo "make test-all  all tests"
	@echo "make fuzz      200,000 hostile messages to a live syncer and a live learner (docs/benchmarks/fuzz.md)"
	@echo "make check     format, lint, types, layers"
	@echo "make chaos     a storm of faults on real processes, one minute, and the same run without (docs/benchmarks/chaos.md)"
	@echo "make extras    install what only some recipes and tests need (docs/dependencies.md)"
	@echo "make clean     remove .venv, caches and build files (outputs/ stays)"
	@echo "PYTHON=...     the interpreter to set .venv up with (now: $(PYTHON))"

setup: $(READY)
	@echo "$(VENV) is ready. A script of your own: $(BIN)/python my_script.py"

train: $(READY)
	@$(BIN)/python recipes/train.py recipe=gpt_text $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest -q -m "not slow" $(ARGS)

test-all: $(READY)
	@$(BIN)/python -m pytest -q $(ARGS)

fuzz: $(READY)
	@$(BIN)/python benchmarks/fuzz.py $(ARGS)

check: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_layering.py

chaos: $(READY)
	@$(BIN)/python benchmarks/chaos.py --minutes 1 $(ARGS)

extras: $(READY)
	@$(PIP) install -qq -c constraints.txt -e '.[test,recipes,companions]'

clean:
	@rm -rf $(VENV) build dist *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and by itself: the largest download fails early, and a retry goes on from there. -qq: errors only, since pip also
# warns of the caller's own settings.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no '$(PYTHON)'. Install Python 3.11, or name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, and $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.11 ..." % v[:2])'
	@echo "Setting up $(VENV): an environment, PyTorch, and what else pyproject.toml names (minutes the first time) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq -c constraints.txt torch
	@$(PIP) install -qq -c constraints.txt -e '.[test]'
	@touch $@
