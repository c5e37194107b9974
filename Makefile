# Development of attrfast. `make demo` and `make test` do everything, on a fresh machine too.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := $(shell find csrc -type f -not -name '*.md' 2>/dev/null)

.PHONY: help venv demo test sanitize soak check format bench gpu gpu-report clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train a small network on digits and prune it (pictures in demo-output/)"
	@echo "make test    run the tests"
	@echo "make sanitize  run the tests of the CPU kernels under AddressSanitizer and UBSan"
	@echo "make soak    2,000 passes, 500 recorders and 200 prunings, and what memory they leave"
	@echo "make check   lint, formatting and types"
	@echo "make format  let ruff and clang-format rewrite the sources"
	@echo "make bench   measure against a bare pass, a hook-based script and other packages"
	@echo "make gpu     test and measure on this machine's GPU; says so if there is none"
	@echo "make gpu-report  compile the GPU kernels, no GPU needed, and read their machine code"
	@echo "make clean   remove what was built; make distclean removes $(VENV) too"

venv: $(INSTALLED)

# Again only when the packaging or the native code has changed.
$(INSTALLED): pyproject.toml setup.py requirements-dev.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet -e ".[data,dev]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m attrfast demo

# Two processes of one thread each finish sooner than one process of two threads.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests

# A copy of the package with a native module of its own; the interpreter has to load the sanitizers first.
# What Python and torch keep to the end of the process is no leak of attrfast's. `pytest`, unlike `python -m
# pytest`, does not look for attrfast in this folder.
SANITIZED := build/sanitized
sanitize: export ATTRFAST_SANITIZE := 1
sanitize: $(INSTALLED)
	ATTRFAST_CUDA=0 $(BIN)/python setup.py -q build --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/objects
	LD_PRELOAD="$$(for name in asan ubsan stdc++; do $(CXX) -print-file-name=lib$$name.so; done | tr '\n' ' ')" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
		PYTHONPATH=$(SANITIZED)/lib $(BIN)/pytest -q -p no:cacheprovider \
		-k "wrong_call or writes_nothing_else or error or outside" \
		tests/test_sanitizer.py tests/test_ops.py tests/test_ops_pooling.py tests/test_ops_errors.py

soak: $(INSTALLED)
	set -e; for what in "passes 2000" "recorders 500" "prunings 200" "controls 2000"; do \
		echo $$what; OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/soak.py $$what; done

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p attrfast
	$(BIN)/mypy -p kernels
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \
		| xargs $(BIN)/clang-format --dry-run -Werror

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \
		| xargs $(BIN)/clang-format -i

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks
	$(BIN)/python -m pytest -q benchmarks/test_ops.py --benchmark-max-time=0.5 --benchmark-columns=median,iqr,rounds

gpu: $(INSTALLED)
	$(BIN)/python -m pytest -q -m gpu tests
	$(BIN)/python -m benchmarks.gpu

gpu-report: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu_report

clean:
	rm -rf build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find attrfast -name '*.so' -delete
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(INSTALLED)

distclean: clean
	rm -rf $(VENV)
