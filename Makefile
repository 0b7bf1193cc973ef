PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# one worker a core, each on one thread; a file whose tests share a fixture stays on one worker (tests/conftest.py)
PARALLEL := --numprocesses logical --maxprocesses 8 --durations 25

.PHONY: demo test suite quick coverage mutants test-slow bench docs lint format clean

demo: $(READY)  ## fine-tune a real encoder on real text and leave runs/demo/report.html
	$(BIN)/tinyspan demo --output runs/demo

test: $(READY)  ## the whole test suite, without what takes minutes
	$(MAKE) -j2 suite lint docs  # the site is built beside the tests: a process on each core has always work

suite: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

quick: $(READY)  ## what to run while working: no scripts, no studies, no other processes, no hundreds of damaged files
	$(BIN)/python -m pytest $(PARALLEL) -m "not (slow or scripts or studies or processes or hostile)"

coverage: $(READY)  ## which lines of the core the suite runs, told and in build/coverage
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" --cov --cov-report term --cov-report html:build/coverage

mutants: $(READY)  ## small faults in the code that no test notices; ONLY="maps partition", SAMPLE=60 of each, AGAIN=1 for survivors
	$(BIN)/python tools/mutants.py $(ONLY) $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(AGAIN),--again)

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
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build --fresh-env --fail-on-warning --keep-going --quiet --doctree-dir build/doctrees docs build/docs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt requirements-no-deps.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-no-deps.txt
	touch $@

clean:
	rm -rf $(VENV) runs build dist docs/generated src/*.egg-info
