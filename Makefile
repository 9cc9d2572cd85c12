# `make quickstart` and `make test` both start from nothing: they build .venv, then do their work.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
REFERENCE := .venv-reference
STAMP := $(VENV)/.installed
INSTALLED := $(shell cat $(STAMP) 2>/dev/null)
EXTRAS ?= $(or $(INSTALLED),test)
FIND_PYTHON := for p in $(PYTHON) python3.14 python3.13 python3.12 python3 python; do \
  if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then echo "$$p"; break; fi; done

.PHONY: venv quickstart test lint format coverage test-slow test-slurm test-multi-device test-gpu parity schema clean

ifneq ($(EXTRAS),$(INSTALLED))  # other extras than the installed ones: build again
.PHONY: $(STAMP)
endif

venv: $(STAMP)

$(STAMP): setup.cfg
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then \
	  echo "error: kimi_jax needs Python 3.12 or newer and found none (tried \$$PYTHON, python3.14 ... python3);" \
	       "install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 2; fi; \
	echo "building $(VENV) with $$($$python --version)"; \
	"$$python" -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@echo '$(EXTRAS)' > $@

quickstart: $(STAMP)
	$(PY) scripts/quickstart.py

# files are shared out over the cores
test: $(STAMP)
	$(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile -m "not gpu and not slow and not multi_device"

test-slow: $(STAMP)
	$(PY) -m pytest -m slow

# a real Slurm on this machine; needs Debian's slurmctld, slurmd and slurm-client
test-slurm: $(STAMP)
	$(PY) -m pytest -m slow tests/slurm

test-multi-device: $(STAMP)
	JAX_NUM_CPU_DEVICES=8 $(PY) -m pytest -n auto --maxprocesses 10 --dist worksteal -m multi_device

# nearly all of it is compilation, a core per worker (PYTEST_XDIST_AUTO_NUM_WORKERS sets how many); workers share what
# they compiled, and each takes only the memory it needs of the one GPU
test-gpu: $(STAMP)
	JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false \
	  $(PY) -m pytest -n auto --maxprocesses 16 --dist worksteal -m gpu

parity: $(STAMP) $(REFERENCE)/.installed
	KIMI_JAX_REFERENCE_PYTHON=$(CURDIR)/$(REFERENCE)/bin/python KIMI_JAX_PARITY_TABLE=$(CURDIR)/build/parity.md \
	  $(PY) -m pytest -s tests/interop/test_parity.py

$(REFERENCE)/.installed: tests/interop/reference/requirements.txt tests/interop/reference/build.py | $(STAMP)
	$(PY) tests/interop/reference/build.py $(REFERENCE)
	@touch $@

coverage: $(STAMP)
	$(PY) -m pytest -m "not gpu and not slow and not multi_device" --cov --cov-report=term-missing:skip-covered

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

schema: $(STAMP)
	$(PY) scripts/train.py --json-schema > experiments/schema.json

clean:
	rm -rf $(VENV) $(REFERENCE) .pytest_cache .ruff_cache *.egg-info
