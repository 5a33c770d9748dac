# Every target works from a bare clone with Python >= 3.11; a C++ compiler makes it fast. `make venv` first runs by itself.

PYTHON ?= python3
# A further package index for torch, where the default one would bring a build for other hardware.
TORCH_INDEX ?=
# How many seeds `make chaos` plays, and the first of them.
SEEDS ?= 1000
FIRST ?= 1
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Tests start hundreds of processes; each would compile all it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help venv demo serve test chaos lint types check clean

help:
	@echo "make demo    start a small cluster, hold three chats with it, show where the time went, stop it"
	@echo "make serve   leave it running on 127.0.0.1:8000"
	@echo "make test    the whole test suite"
	@echo "make check   lint, types and tests"
	@echo "make chaos SEEDS=1000   simulated clusters under drawn faults; a failing seed is told with how to repeat it"
	@echo "make bench-NAME [ARGS=...]   run benchmarks/NAME.py, e.g. make bench-engine ARGS=--quick"

venv: $(STAMP)

# Torch goes first, so that the constraint alone decides which build comes.
$(STAMP): pyproject.toml constraints.txt
	@echo "[venv] checking $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tandem needs Python 3.11 or newer; make venv PYTHON=python3.11")'
	@command -v c++ >/dev/null || command -v g++ >/dev/null || echo "[venv] no C++ compiler found: the slower operators will be used"
	@echo "[venv] creating $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[venv] installing torch (the largest part)"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@echo "[venv] installing Tandem and its tools"
	@$(PIP) -e '.[dev]'
	@touch $@
	@echo "[venv] ready"

demo: $(STAMP)
	@$(BIN)/tandem demo

serve: $(STAMP)
	@$(BIN)/tandem serve --config configs/local.yaml $(ARGS)

# Whole clusters wait more than they compute (for time limits, for processes to start): five files of them share the
# machine, however many cores it has. The other tests compute. Not in order of size: what only waits comes last
# (and what would be a long last one comes first, see tests/conftest.py).
# Those with constant streams compute too, and go two by two. Whether requests are in time under overload is asked alone:
# others would be the overload. LONG_TESTS=1 adds what takes minutes.
test: $(STAMP)
	@$(BIN)/pytest -n auto --dist loadfile tests/unit tests/simulation tests/integration/test_simulate_command.py $(ARGS)
	@$(BIN)/pytest -n 5 --dist loadfile --no-loadscope-reorder tests/integration \
		--ignore tests/integration/test_simulate_command.py --ignore tests/integration/test_overload.py \
		--ignore tests/integration/test_operations.py --ignore tests/integration/test_migration.py $(ARGS)
	@$(BIN)/pytest -n 2 --dist loadfile tests/integration/test_operations.py tests/integration/test_migration.py $(ARGS)
	@$(BIN)/pytest tests/integration/test_overload.py $(ARGS)

chaos: $(STAMP)
	@$(BIN)/python -m simulator.chaos --first $(FIRST) --seeds $(SEEDS) $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .

types: $(STAMP)
	@$(BIN)/mypy
	@$(BIN)/pyright

check: lint types test

bench-%: $(STAMP)
	@$(BIN)/python -m benchmarks.$* $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
