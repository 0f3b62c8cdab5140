# Every target makes what it needs: the virtual environment, the native module, the right extra. A second run finds it there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILT_FROM := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

.PHONY: demo test lint format bench tables clean

demo: $(VENV)/installed-fewshot
	$(BIN)/fused-margins demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest $(TEST_ARGS)

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp')

format: $(VENV)/installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp')

bench: $(VENV)/installed-bench
	$(BIN)/python -m pytest benchmarks --benchmark-columns=min,median,iqr,rounds $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables

tables: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks.tables

$(VENV)/installed-%: $(BUILT_FROM)
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf build dist $(VENV) *.egg-info fused_margins/*.so fused_margins/native_build_failure.txt
