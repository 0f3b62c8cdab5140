# Every target makes what it needs: the virtual environment, the native module, the right extra. A second run finds it there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILT_FROM := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

.PHONY: demo docs wheel reproduce reproduce-long reproduce-features parity test test-kernels test-distributed-faults test-fewshot-kills lint format bench growth tables fuzz sanitize aarch64 cuda-on-cpu gpu gpu-build gpu-test gpu-sanitize gpu-determinism gpu-bench clean

demo: $(VENV)/installed-fewshot
	$(BIN)/fused-margins demo

# A test a core, but for those that share something: in one process the suite takes twice as long.
test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal --ignore=tests/kernels $(TEST_ARGS)

# The kernels for a GPU without one: compiled for every architecture (nvcc, where it is there; Triton), and Triton's
# interpreted on the CPU. The two cannot share a process.
test-kernels: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal tests/kernels $(TEST_ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --dist worksteal --require-backends=triton -W ignore::RuntimeWarning -m interpreted -k "triton or test_interpreted or test_exponentials" tests/kernels tests/ops $(TEST_ARGS)

# Omniglot where FUSED_MARGINS_DATA says, or in ./data, and digits; `--dry-run` says how long it takes: some 45 minutes on two
# cores of a Zen 3. Called again, it goes on where it stopped.
reproduce: $(VENV)/installed-bench
	$(BIN)/fused-margins reproduce --output runs/reproduce
	$(call keep,runs/reproduce,fewshot)
	$(BIN)/python -m benchmarks.tables

# CIFAR-FS: margins with Conv4 of 64 channels until they converge. An epoch takes 12 to 40 s of one core: nine trainings of
# 80 epochs are 2.4 to 8 hours. Every margin has its first seed before one has its second; `fused-margins compare runs/long`
# shows what is finished. Called again, it goes on where it stopped. What docs/benchmarks/long holds counts as finished
# where it is copied to runs/long before. Trainings of the earlier study, 100 epochs of a cosine, want another folder.
reproduce-long: $(VENV)/installed-bench
	$(BIN)/fused-margins reproduce --long --output runs/long
	$(call keep,runs/long,long)
	$(BIN)/python -m benchmarks.tables

# caltech101.zip and gtsrb_tracks.zip where FUSED_MARGINS_DATA says, or in ./data: their features once, and the claims on them.
FEATURES := runs/of-photographs
reproduce-features: $(FEATURES)/caltech101.safetensors $(FEATURES)/gtsrb.safetensors
	$(BIN)/fused-margins reproduce --features $(FEATURES) --output runs/features
	$(call keep,runs/features,features)

$(FEATURES)/caltech101.safetensors: | $(VENV)/installed-features
	$(BIN)/fused-margins embed $${FUSED_MARGINS_DATA:-data}/caltech101.zip -o $@ --split image --without BACKGROUND_Google

$(FEATURES)/gtsrb.safetensors: | $(VENV)/installed-features
	$(BIN)/fused-margins embed $${FUSED_MARGINS_DATA:-data}/gtsrb_tracks.zip -o $@ --split image --group '^[0-9]+' --image-size 96

# Every loss on every backend, on the same data: a quarter of an hour more.
parity: $(VENV)/installed-bench
	$(BIN)/fused-margins reproduce --parity --output runs/parity
	$(call keep,runs/parity,parity)
	$(BIN)/python -m benchmarks.tables

# $(call keep,FOLDER,NAME): the report of FOLDER, without its pictures, is the page NAME of docs/benchmarks.
define keep
{ sed '/^!\[/d; /^Every figure is from the runs beside/d' $(1)/report.md; $(BIN)/python -c 'import json; r = json.load(open("$(1)/studies.json")); print("\nTraining took %.0f s, added up; %s." % (r["seconds"], ", ".join(map(" ".join, r["versions"].items()))))'; } | cat -s > docs/benchmarks/$(2).md
endef

# One of four ranks is killed at a random moment, ten times. Some minutes.
test-distributed-faults: $(VENV)/installed-test
	$(BIN)/python -m tests.distributed.faults

# A training, and a study of two workers, are killed at 25 random moments each, and end with the same bits. Some minutes.
test-fewshot-kills: $(VENV)/installed-test
	$(BIN)/python -m tests.fewshot.kills

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

format: $(VENV)/installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# Every row, on one thread and on all: more than an hour.
bench: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks --large --threads 1 $(BENCH_ARGS)
	$(BIN)/python -m benchmarks --large $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables

# Time and memory against the number of classes and of rows.
growth: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks --growth $(GROWTH_ARGS)
	$(BIN)/python -m benchmarks.tables --pictures build/pictures

tables: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks.tables

# The site, in build/site: every page of docs and the API reference; a warning is an error.
docs: $(VENV)/installed-docs
	$(BIN)/python -m mkdocs build --quiet

# A wheel for this Python, with OpenMP left to torch, and what it needs of the system; tried in an environment of its own.
wheel: $(VENV)/installed-wheel
	rm -rf build/wheel && mkdir -p build/wheel
	FUSED_MARGINS_BUILD=cpu $(BIN)/python -m build --wheel --outdir build/wheel
	PATH=$(BIN):$$PATH $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	$(PYTHON) -m venv --clear build/wheel/venv
	build/wheel/venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt dist/*.whl
	cd build/wheel && venv/bin/fused-margins doctor && venv/bin/python ../../tests/packaging/smoke.py

# 20,000 random calls, 5,000 direct calls of the ops and 2,000 data sets and runs, damaged or not: about twenty minutes. The
# same seed makes the same cases, and each finding comes with the command that replays it.
fuzz: $(VENV)/installed-test
	$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

# The kernels without Python, under AddressSanitizer, UndefinedBehaviorSanitizer and valgrind.
sanitize:
	$(PYTHON) tests/native/run.py

# The same sources for 64-bit ARM: needs g++-aarch64-linux-gnu, and qemu-user to run what it builds.
AARCH64 ?= aarch64-linux-gnu-g++
aarch64:
	mkdir -p build/aarch64
	for op in $$(ls csrc/*/cpu.cpp); do \
	  $(AARCH64) -std=c++17 -O2 -Wall -Wextra -Werror -Wno-psabi -fopenmp -DFM_ISA=baseline -c $$op -o build/aarch64/$$(basename $$(dirname $$op)).o || exit 1; \
	done
	$(AARCH64) -std=c++17 -O2 -Wall -Wextra -Werror -Wno-psabi -fopenmp -static csrc/cpu/isa.cpp tests/native/driver.cpp build/aarch64/*.o -o build/aarch64/driver
	if command -v qemu-aarch64 > /dev/null; then qemu-aarch64 build/aarch64/driver few; fi

# The CUDA kernels thread by thread on a CPU, every case of their ops; needs nvcc. Some minutes.
cuda-on-cpu: $(VENV)/installed-test
	$(BIN)/python -m pytest tests/native/emulate_cuda.py

# On a machine with an NVIDIA GPU, with the Python that is there: no environment is made, nothing is downloaded. It needs
# torch, nvcc and what the bench-gpu extra names, of which peers may be missing.
GPU_PYTHON ?= python3
COMPUTE_SANITIZER ?= compute-sanitizer
gpu:
	$(MAKE) gpu-build
	$(MAKE) gpu-test
	$(MAKE) gpu-sanitize
	$(MAKE) gpu-determinism
	$(MAKE) gpu-bench

gpu-build:
	FUSED_MARGINS_BUILD=cuda $(GPU_PYTHON) setup.py -q egg_info build_ext --inplace

# cuBLAS is deterministic, as the tests ask, with a workspace of a fixed size.
gpu-test: export CUBLAS_WORKSPACE_CONFIG = :4096:8
gpu-test:
	$(GPU_PYTHON) -m pytest $(addprefix tests/ops/suite/test_,parity.py memory.py determinism.py) $(wildcard tests/ops/test_*.py) tests/mining --require-backends=triton,cuda -k "triton or cuda" $(TEST_ARGS)

# Every tensor an allocation of its own: in torch's cache, who reads beyond one reads another.
gpu-sanitize:
	for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(COMPUTE_SANITIZER) --tool $$tool --error-exitcode 1 $(GPU_PYTHON) -m tests.gpu.sanitize || exit 1; \
	done

gpu-determinism:
	$(GPU_PYTHON) -m tests.gpu.determinism

gpu-bench:
	$(GPU_PYTHON) -m benchmarks --device cuda $(BENCH_ARGS)
	$(GPU_PYTHON) -m benchmarks.tables

# What is built says so, a line a file. A torch that is there already stays as it is: where it is another than the pinned
# one it takes its place, and Triton, which belongs to it, has none.
PINNED := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --constraint $(VENV)/constraints.txt
define environment
test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
$(MAKE) --no-print-directory $(VENV)/constraints.txt
endef
$(VENV)/installed-%: $(BUILT_FROM)
	$(environment)
	$(PIP) torch numpy 'setuptools>=77' 'pybind11>=2.13' 'ninja>=1.11'
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(PIP) --no-build-isolation --editable '.[$*]'
	touch $@

# Lint runs no kernel: nothing is built for it.
$(VENV)/installed-lint: pyproject.toml constraints.txt
	$(environment)
	$(PIP) torch numpy $$(sed -n 's/^lint = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',"')
	touch $@

.PHONY: $(VENV)/constraints.txt
$(VENV)/constraints.txt:
	torch=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))' 2> /dev/null); \
	case "$$torch" in \
	  '' | $(PINNED) | $(PINNED)+*) cat constraints.txt ;; \
	  *) sed '/^torch==/d; /^triton==/d' constraints.txt; echo "torch==$$torch" ;; \
	esac > $@

clean:
	rm -rf build dist $(VENV) *.egg-info fused_margins/*.so fused_margins/native_build_failure.txt
