# deltal: `make demo` trains a real model on this machine, `make test` runs the whole test suite.
# pip's own settings (indexes, proxies, wheels) are honoured; nothing is installed again while it is up to date.
PYTHON ?= python3
PY := .venv/bin/python
DELTAL := .venv/bin/deltal

.PHONY: install demo test test-slow test-all faults variance-demo bench-learner bench-packing bench-rollout bench-sketch bench-checkpoint lint format docs clean
.DEFAULT_GOAL := install

install: .venv/installed

.venv/installed: pyproject.toml deploy/constraints.txt deploy/cpu-without-dependencies.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "deltal needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "this Python cannot make virtual environments: apt install python3-venv" >&2; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --constraint deploy/constraints.txt --editable '.[cpu,dev]'
	$(PY) -m pip install --quiet --no-deps --requirement deploy/cpu-without-dependencies.txt
	@touch $@

demo: install
	$(DELTAL) train configs/demo.yaml

test: install
	$(PY) -m pytest -m "not slow" -n 2 --dist loadfile tests/unit tests/test_house.py
	$(PY) -m pytest -m "not slow" tests/system tests/faults

# What `make test` leaves out, the quickest first: an hour's limit in CI then cuts off the least.
test-slow: install
	$(PY) -m pytest -m slow

test-all: test test-slow

# What each aggregation would do to the demo model's real gradients: table, CSV and PNG in build/variance-demo.
variance-demo: install
	$(DELTAL) variance configs/demo.yaml --set rollout.max_response_tokens=64 --out build/variance-demo

# The learner's step against TRL's loss, side by side; TRL lives in a venv of its own, with the same torch.
bench-learner: install build/trl-venv/installed
	$(PY) -m tests.bench.learner

build/trl-venv/installed: deploy/constraints.txt
	$(PYTHON) -m venv build/trl-venv
	grep -E '^(torch|transformers|accelerate|datasets|numpy)==' deploy/constraints.txt > build/trl-venv/constraints.txt
	build/trl-venv/bin/python -m pip install --quiet --constraint build/trl-venv/constraints.txt torch 'trl==1.16.*'
	@touch $@

# Dense mask or block by block, prompt shared or repeated, at three ratios of prompt to response.
bench-packing: install
	$(PY) -m tests.bench.packing

# Seconds of a checkpoint's copy, write and load, and of publishing, at one rank and at two.
bench-checkpoint: install
	$(PY) -m tests.bench.checkpoint

bench-sketch: install
	$(PY) -m tests.bench.sketch

bench-rollout: install
	$(PY) -m tests.bench.rollout

faults: install
	$(PY) -m pytest tests/faults

lint: install
	$(PY) -m ruff check system tests
	$(PY) -m ruff format --check system tests
	$(PY) -m mypy

format: install
	$(PY) -m ruff check --fix system tests
	$(PY) -m ruff format system tests

docs: install
	$(DELTAL) config configs/tiny.yaml
	$(PY) -m deltal.monitor.dashboards > dashboards/deltal.json
	$(PY) -m deltal.verify.page > docs/verifiers.md

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
