# make demo: draw scenes, train two attention designs on them, report, index and search.
# make test: what has to hold, in some ten minutes; make test-slow: the rest of it, in real processes; make test-docs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
# The releases that the project is tested with; `pip install clipvisionalign` takes any that pyproject.toml admits.
TORCH := torch==2.14.1 torchvision==0.29.1

# Processes that share the tests; which tests, by their marks; what else pytest is told, such as PYTEST_FLAGS="--no-skips"
# or "-k attention".
WORKERS ?= 2
TESTS ?= not slow
PYTEST_FLAGS ?=

.PHONY: install install-docs demo test test-quick test-slow test-all test-docs test-parts lint docs docs-serve bench clean

install: $(STAMP)

$(STAMP): pyproject.toml starter/pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up $(VENV): some minutes, once (PyTorch is several GB)"
	$(PYTHON) -m venv $(VENV)
	@# The pip that comes with an interpreter may be years old, and takes minutes to choose versions.
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH) --editable ".[test]" --editable ./starter
	@touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --editable ".[docs]"
	@touch $(DOCS_STAMP)

install-docs: $(DOCS_STAMP)

demo: install
	$(BIN)/python -m clipvisionalign.demo

test: lint test-quick

# test-slow: whole studies, processes that are killed, several processes, Ray, the page in a browser; half an hour.
test-slow: TESTS = slow
test-quick test-slow: install test-parts
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup -m "$(TESTS)" $(PYTEST_FLAGS)

# With all combinations of settings, more kills, random dealings of streams and cases of the service than the others have
# time for, with all scenes of the demo and compiled kernels: an hour.
test-all: export COMBINATIONS = all
test-all: export KILLS = 100
test-all: export DEALINGS = 70
test-all: export INTERFACE_CASES = 100
test-all: export WHOLE_DEMO = 1
test-all: export COMPILE_BACKEND = inductor
test-all: export FAULTS = all
test-all: test test-slow

# Every command block of README and docs, the doctests, the site and the built wheel: some minutes.
test-docs: $(DOCS_STAMP)
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup --docs $(PYTEST_FLAGS) tests/test_docs.py

# The documentation as a site in site/; `make docs-serve` shows it while it is written.
docs: $(DOCS_STAMP)
	$(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html: written; to read it: $(BIN)/python -m http.server --directory site"

docs-serve: $(DOCS_STAMP)
	$(BIN)/mkdocs serve

# A Chromium and a C++ compiler for the tests, where the system has none.
test-parts: install
	$(BIN)/python tests/optional_parts.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry src

bench: install
	$(BIN)/python benchmarks/retrieval.py
	$(BIN)/python benchmarks/attention.py

clean:
	rm -rf $(VENV) demo site
