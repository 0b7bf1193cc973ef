PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow bench docs lint format clean

demo: $(READY)  ## fine-tune a real encoder on real text and leave runs/demo/report.html
	$(BIN)/tinyspan demo --output runs/demo

test: $(READY) lint docs  ## the whole test suite, without what takes minutes
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY)  ## what takes minutes: killing, fuzzing, thousands of points
	$(BIN)/python -m pytest -m slow -s

bench: $(READY)  ## the short forms of the benchmarks, in at most ten minutes; every figure goes to runs/bench
	mkdir -p runs/bench
	$(BIN)/python benchmarks/discovery.py --quick --json runs/bench/discovery.json
	$(BIN)/python benchmarks/recording.py --quick --json runs/bench/recording.json
	$(BIN)/python benchmarks/step.py --quick --json runs/bench/step.json

docs: $(READY)  ## the site in build/docs, whose examples are run; warnings are errors
	mkdir -p docs/generated
	$(BIN)/typer tinyspan.cli utils docs --name tinyspan --title "The commands" --output docs/generated/cli.md
	$(BIN)/sphinx-build --fresh-env --fail-on-warning --keep-going --quiet --doctree-dir build/doctrees docs build/docs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist docs/generated src/*.egg-info
