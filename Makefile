# Everything runs in a virtual environment of its own, made on first use and again when pyproject.toml changes.
#
#   make demo        train a digit classifier, print the receipt, save demo.png
#   make test        all checks: ruff, mypy, the import contract, pytest, notebooks
#   make test-gpu    the tests that need an NVIDIA GPU, and the CPU's tests on it; make bench-gpu: kernels, training
#                    steps and first calls there. Where pip reaches no index: python tests/run_on_gpu.py
#   make bench       the training steps of benchmarks/ beside PyTorch and JAX, in an environment of their own

PYTHON ?= python3
VENV   := .venv
PEERS  := .venv-peers

.PHONY: demo test lint bench test-gpu bench-gpu fuzz golden clean

demo: $(VENV)/.ready
	$(VENV)/bin/python -m benchmarks.demo

test: $(VENV)/.ready lint
	$(VENV)/bin/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal tests

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check jitgrad kernels tests benchmarks
	$(VENV)/bin/mypy

fuzz: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -q tests/test_programs.py --programs 20000

golden: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -q tests/test_golden.py --update-golden

bench: $(PEERS)/.ready
	$(PEERS)/bin/python -m benchmarks

# Both say so and do nothing where there is no GPU. PyTorch takes part in the second where it is installed with CUDA.
test-gpu: $(VENV)/.ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,cuda]'
	$(VENV)/bin/python tests/run_on_gpu.py --tests || [ $$? -eq 2 ]

bench-gpu: $(VENV)/.ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[demo,cuda]'
	$(VENV)/bin/python -m benchmarks gpu

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
