# make test    set up .venv and run the tests (no GPU needed)
# make lint    ruff, mypy, clang-format
# make demo    train a small DCNv2 detector on synthetic images, evaluate it and draw its detections; out/detector/
# make bench   compare the operations with torchvision's; table, and out/benchmark.json
# make docs    build the documentation; out/site/
# make gpu     on a machine with a GPU and all packages installed (it creates no .venv): GPU tests, sanitizers and
#              benchmarks in ten minutes; table, and out/gpu/gpu.json; PARTS="tests sanitizers benchmark model" selects

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test lint format demo bench docs gpu clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

test: setup
	$(BIN)/python -m pytest -n auto

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror cuda/*.cu cuda/dcn/*.cuh

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i cuda/*.cu cuda/dcn/*.cuh

demo: setup
	$(BIN)/python -m examples.detector demo

bench: setup
	$(BIN)/python -m benchmarks

docs: setup
	$(BIN)/mkdocs build --strict

gpu:
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --no-index --editable .
	$(PYTHON) -m benchmarks.gpu $(PARTS)

clean:
	rm -rf .venv build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
