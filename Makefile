# make train   sets up and trains the debug hybrid on the embedded text
# make test    sets up and runs lint, type checks and the tests
# make test-long   the exhaustive tests, about half an hour; run before a release
# make docs    builds the documentation site in site/
# Setting up is done once; a run is repeated when its sources have changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := outputs/debug
CONFIG := train_configs/debug.toml
SOURCES := train.py $(CONFIG) $(shell find torchlmoe kernels assets -name '*.py' -o -name '*.parquet' -o -name '*.json')

.PHONY: train test test-long lint docs clean

train: $(RUN)/finished
	@tail -n 1 $(RUN)/metrics.jsonl | $(BIN)/python -c "import json, sys; r = json.load(sys.stdin); \
	print(f\"step {r['step']}: validation loss {r['val_loss']:.4f}, {r['val_bits_per_byte']:.4f} bits per byte\")"
	@echo "loss curve: $(RUN)/loss_curve.png"
	@$(BIN)/python -m torchlmoe.generate --checkpoint $(RUN) --temperature 0.7 --prompt "It is a truth universally acknowledged"

$(RUN)/finished: $(VENV)/installed $(SOURCES)
	@# A finished run is set aside; one that was interrupted resumes from its last checkpoint.
	@if [ -e $@ ]; then rm -rf $(RUN).before && mv $(RUN) $(RUN).before; fi
	$(BIN)/python train.py --job.config_file $(CONFIG)

test: $(VENV)/installed-test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

test-long: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m long

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): this downloads and installs PyTorch, a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) outputs build dist site *.egg-info
