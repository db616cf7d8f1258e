# Every target does its own set-up in .venv; all it needs is Python >= 3.10, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
OUT ?= runs
RUN := $(OUT)/quickstart/latest
WORKERS ?= 2
# For tests, which run side by side, and for small models: more threads would only wait for one another.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-install lint docs gallery format bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(STAMP) ## create .venv and install what constraints.txt pins

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment: on Debian and Ubuntu, apt install python3-venv" >&2; exit 2; }
	@echo "installing PyTorch into $(VENV), then the rest: some minutes"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(STAMP) ## train on the sample data, show the errors, run a short MD (two to five minutes)
	$(ONE_THREAD) $(BIN)/escaip fit --config quickstart --out $(OUT)
	$(ONE_THREAD) $(BIN)/escaip md $(RUN)/best.ckpt md/structures/ethanol.xyz --ensemble nve --temperature 300 --steps 2000 \
	    --timestep 0.5 --dtype float64 --overwrite --out $(RUN)/nve.extxyz
	@echo "model $(RUN)/best.ckpt, plots $(RUN)/evaluation, trajectory and log $(RUN)/nve.extxyz, $(RUN)/nve.csv"

test: $(STAMP) ## run the test suite (six to twelve minutes on two cores)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q

test-install: $(STAMP) ## only the test that the wheel works away from the checkout
	$(BIN)/python -m pytest -q tests/test_install.py

lint: $(STAMP) ## formatting, lint, types, and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

docs: $(STAMP) ## build the documentation into site/, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

gallery: $(STAMP) ## execute the notebooks of docs/gallery again, in runs/gallery (five minutes)
	rm -rf $(OUT)/gallery && mkdir -p $(OUT)/gallery
	PATH="$(abspath $(BIN)):$$PATH" $(ONE_THREAD) $(BIN)/python docs/execute_gallery.py $(OUT)/gallery

format: $(STAMP) ## rewrite the files in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## the benchmarks that run in minutes on a CPU
	$(BIN)/python benchmarks/graph.py --out runs/bench/graph.json
	$(BIN)/python benchmarks/contracts.py --out runs/bench/contracts.json

clean: ## remove what the targets made, but for trained models in runs/
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
