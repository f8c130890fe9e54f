# Everything runs in .venv, which the first target makes. Needs Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu test-vllm test-sglang test-eval unit test-oldest matrix coverage lint metrics docs bench fuzz fuzz-python clean

help: ## Show the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt setup.py $(wildcard native/*.c native/*.h)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

setup: $(READY) ## Make the environment.

demo: $(READY) ## Convert, verify and run small real models (SmolLM2-135M-Instruct, MiniLM-L6; about 180 MB to fetch once).
	$(BIN)/python -m demo.run

# One worker per core: more threads in each would wait for each other.
test unit test-oldest matrix: export OMP_NUM_THREADS = 1

test: $(READY) ## Run every test; those that need a GPU too where there is one.
	$(BIN)/python -m pytest -n auto --dist worksteal
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(MAKE) --no-print-directory test-gpu; fi

test-gpu: $(READY) ## Run the tests that need a GPU, and those of the kernels there.
	$(BIN)/python -m pytest --gpu -n 4

VLLM := .venv-vllm

test-vllm: ## Run the tests of vLLM's plug-in on the CPU, in an environment of their own (3.5 GB, made once).
	@test -e $(VLLM)/.ready || $(PYTHON) -m tests.serving.environment $(VLLM)
	@touch $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest tests/serving

SGLANG := .venv-sglang

test-sglang: ## Run the tests of SGLang's plug-in on the CPU, in an environment of their own (7 GB, made once).
	@test -e $(SGLANG)/.ready || $(PYTHON) -m tests.serving.sglang_environment $(SGLANG)
	@touch $(SGLANG)/.ready
	$(SGLANG)/bin/python -m pytest tests/serving/test_sglang.py tests/serving/test_sglang_names.py

TASKS := .venv-eval

test-eval: ## Run the tests of tasks through lm-evaluation-harness, in an environment of their own (made once).
	@test -x $(TASKS)/bin/python || $(PYTHON) -m venv $(TASKS)
	@test -e $(TASKS)/.ready || $(TASKS)/bin/python -m pip install --quiet --constraint constraints.txt torch
	@test -e $(TASKS)/.ready || $(TASKS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[eval,test]'
	@touch $(TASKS)/.ready
	$(TASKS)/bin/python -m pytest tests/tasks

unit: $(READY) ## Run the tests that need neither torch nor a model (under a minute).
	$(BIN)/python -m pytest -n auto --dist worksteal tests/unit tests/malformed tests/golden tests/property

test-oldest: $(READY) ## Run the loader's tests with the oldest transformers, in an environment of its own.
	$(BIN)/python -m tests.matrix --versions 5.16.0

matrix: $(READY) ## Run the loader's tests with six versions of transformers, each in an environment of its own.
	$(BIN)/python -m tests.matrix

COVERAGE := $(BIN)/python -m coverage

coverage: $(READY) ## Measure branch coverage: formats 100 %, converter and loader 95 % or more.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[coverage]'
	@$(COVERAGE) erase
	$(COVERAGE) run -m pytest -n auto --dist worksteal tests/unit tests/conformance tests/golden tests/property tests/security/test_unlisted_files.py \
	  tests/malformed --ignore tests/malformed/test_flips.py --ignore tests/malformed/test_bombs.py
	$(COVERAGE) combine --quiet --append
	$(COVERAGE) report --include '*/formats/*' --fail-under 100
	$(COVERAGE) run -m pytest -n auto --dist worksteal tests/converter tests/faults tests/loader tests/integration \
	  --deselect tests/faults/test_faults.py::test_a_file_size_limit_is_an_error_with_nothing_left
	$(COVERAGE) combine --quiet --append
	$(COVERAGE) report --include '*/converter/*' --fail-under 95
	$(COVERAGE) report --include '*/loader/*' --fail-under 95

lint: $(READY) ## Check style, types, and that editors resolve our imports.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lint]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --config-file pyproject.toml -p codecllm
	$(BIN)/python -m tools.resolved_imports
	$(BIN)/python -m tools.metrics --check

metrics: ## Print the figures of words, density, files, imports and documents beside their bars.
	$(PYTHON) -m tools.metrics

docs: $(READY) ## Build the documentation site into build/site; warnings are errors.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY) ## Measure convert and load against their floors, and peak memory.
	$(BIN)/python -m benchmarks.run

FUZZ_RUNS ?= 10000000
CORE      := $(addprefix native/,check.c dispatch.c kernels_avx2.c kernels_avx512.c kernels_neon.c kernels_portable.c pack.c rans.c run.c xxh3.c)
SANITIZED := -std=gnu11 -O1 -g -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all -Inative -DPIECE=48 -DCOUNTED_EXACTLY=200
# Tracing each comparison took nine tenths of the time of loops over symbols, which compare nothing
# that an input would have to hit.
UNTRACED  := pack rows

fuzz: ## Run the native core's fuzz targets, FUZZ_RUNS executions in all (libFuzzer where clang is).
	@mkdir -p build/fuzz
	@if command -v clang > /dev/null; then \
	  for target in run check decode table encode fit pack rows; do \
	    mkdir -p build/fuzz/$$target.inputs && \
	    clang $(SANITIZED) -fsanitize=fuzzer $$(case " $(UNTRACED) " in *" $$target "*) echo -fno-sanitize-coverage=trace-cmp; esac) -DFUZZ_TARGET=fuzz_$$target native/fuzz/targets.c $(CORE) -o build/fuzz/$$target && \
	    build/fuzz/$$target -runs=$$(( $(FUZZ_RUNS) / 8 + 1 )) -max_len=2000 build/fuzz/$$target.inputs || exit 1; \
	  done; \
	else \
	  $(CC) $(SANITIZED) native/fuzz/*.c $(CORE) -o build/fuzz/mutate && build/fuzz/mutate $(FUZZ_RUNS); \
	fi

FUZZ_SECONDS ?= 60
FUZZ_PYTHON  := build/fuzz-python.venv

fuzz-python: $(READY) ## Run the fuzz targets of the Python readers, FUZZ_SECONDS each (atheris, in an environment of its own).
	@test -x $(FUZZ_PYTHON)/bin/python || $(BIN)/python -m venv $(FUZZ_PYTHON)
	$(FUZZ_PYTHON)/bin/python -m pip install --quiet 'atheris>=3,<4'
	@for target in $$($(BIN)/python -c 'from tests.fuzz.targets import TARGETS; print(*TARGETS)'); do \
	  PYTHONPATH=.:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	    $(FUZZ_PYTHON)/bin/python -m tests.fuzz.run $$target -max_total_time=$(FUZZ_SECONDS) || exit 1; \
	done

clean: ## Remove the environment and what the targets made.
	rm -rf $(VENV) $(VLLM) $(SGLANG) $(TASKS) .matrix build codecllm/_native*.so demo/out benchmarks/out *.egg-info .pytest_cache .coverage* .mypy_cache .ruff_cache .hypothesis
