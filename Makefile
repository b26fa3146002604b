# make test    create .venv, then run the tests (no GPU needed)
# make test-quick while you edit: without the tests marked slow, with fewer random examples
# make test-all also the exhaustive variants: every specialisation for every architecture and under the sanitizers
# make lint    run ruff, mypy and clang-format
# make format  fix what ruff and clang-format can fix
# make demo    train a small DCNv2 detector on synthetic images, evaluate it, draw its detections; out/detector/
# make bench   time the operations and their competitors; prints a table, writes out/benchmark.json
# make docs    build the documentation; out/site/
# make gpu     on a machine with a GPU and the packages installed (creates no .venv): GPU tests, sanitizers and benchmarks
#              in ten minutes; prints one table, writes out/gpu/gpu.json; PARTS="model workspace tests sanitizers benchmark"
#              selects parts, of which one alone takes at most four minutes
# make clean   delete .venv, build outputs and caches

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test test-quick test-all lint format demo bench docs gpu clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Tests start many processes, which would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

PYTEST = $(BIN)/python -m pytest -n auto --dist worksteal

test: setup
	$(PYTEST)

test-quick: setup
	$(PYTEST) -m "not gpu and not exhaustive and not slow" --hypothesis-profile=brief

test-all: setup
	$(PYTEST) -m "not gpu"

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
