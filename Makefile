# Everything runs in a virtual environment of its own, made on first use and again when pyproject.toml changes.
#
#   make demo        train a digit classifier, print the receipt, save demo.png
#   make test        all checks: ruff, mypy, the import contract, pytest, notebooks
#   make bench       the training steps of benchmarks/ beside PyTorch and JAX, in an environment of their own

PYTHON ?= python3
VENV   := .venv
PEERS  := .venv-peers

.PHONY: demo test lint bench fuzz golden clean

demo: $(VENV)/.ready
	$(VENV)/bin/python -m benchmarks.demo

test: $(VENV)/.ready lint
	$(VENV)/bin/python -m pytest -q tests

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check jitgrad kernels tests benchmarks
	$(VENV)/bin/mypy

fuzz: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -q tests/test_programs.py --programs 20000

golden: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -q tests/test_golden.py --update-golden

bench: $(PEERS)/.ready
	$(PEERS)/bin/python -m benchmarks

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,demo]'
	touch $@

# torch is pinned: without a version pip takes the newest build with several gigabytes of CUDA packages.
$(PEERS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,demo]' torch==2.13.0 jax jaxlib
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info
