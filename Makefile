# make demo, make test: each makes its own .venv and installs what it needs. PYTHON=python3.12 chooses another Python,
# TORCH='torch==2.11.0' another torch (an index that serves CPU builds saves gigabytes where there is no GPU).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Two workers, and a file of tests to one of them: what a file builds once is built once. tests/conftest.py orders the files.
PYTEST_ARGS ?= --numprocesses=2 --dist=loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRAIN := $(VENV)/.installed-train
NATIVE := $(shell find csrc cmake -type f) CMakeLists.txt

.PHONY: demo real test lint bench install clean

demo: $(TRAIN)
	$(BIN)/shapo demo --output runs/demo

# A real aligned model and real answers, half an hour on two cores; goes on where it was stopped.
real: $(TRAIN)
	$(BIN)/python -m pip install --quiet gguf
	$(BIN)/python examples/real_model.py runs/real

test: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.[ch]*' -print0 | xargs -0 $(BIN)/clang-format --dry-run -Werror

bench: install
	$(BIN)/python -m pytest benchmarks

install: $(STAMP)

$(TRAIN): EXTRAS := train
$(STAMP): EXTRAS := test,bench

# Torch first and by name: everything after it then finds one and fetches no other. What tests need, the demo's too.
$(TRAIN) $(STAMP): pyproject.toml setup.py $(wildcard tools/*.py) $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet --no-compile '$(TORCH)'
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[$(EXTRAS)]'
	touch $(TRAIN) $@

clean:
	rm -rf build dist runs *.egg-info python/*.egg-info shapo_kernels/*.so shapo_kernels/cuda_architectures.txt
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
