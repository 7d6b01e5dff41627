# make figure1   Figure 1 from the bundled clip, into figure1-out/
# make figure1-all   the same with every method
# make simulate  Figure 1 at full size on two GPUs, without one, into simulate-out/
# make test      lint, types and tests, on the installed wheel
# make mutants   seeded faults in the kernels, which the tests must catch, into tests/mutants/outcome.json
# make aot       every tile in every dtype, compiled for sm_80, sm_90 and sm_100 (make test: bfloat16, the first two)
# make compat    the model layer's tests with the oldest transformers that is supported
# make clean     remove everything that these made

PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
SOURCES := pyproject.toml README.md LICENSE $(shell find palkernels model bench -type f \
	-not -path '*/__pycache__/*' -not -path 'bench/results/*')
# Triton's interpreter multiplies by NumPy. Which of OpenBLAS' kernels it takes depends on the processor, and some sum less
# exactly than the tests' bounds allow, which are held against PyTorch's own products.
BLAS := $(if $(shell grep -m 1 -o avx512f /proc/cpuinfo 2>/dev/null),OPENBLAS_CORETYPE=SkylakeX)
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: figure1 figure1-all simulate test lint aot mutants compat clean

figure1: .venv/installed
	$(BIN)/palkernels figure1

figure1-all: .venv/installed
	$(BIN)/palkernels figure1 --methods all --out figure1-all-out

simulate: .venv/installed
	$(BIN)/palkernels simulate

test: lint
	PALKERNELS_TEST_WHEEL=1 OMP_NUM_THREADS=1 $(BLAS) $(BIN)/pytest --numprocesses 2 --dist loadfile

aot: .venv/installed
	PALKERNELS_AOT=all $(BIN)/pytest tests/kernels/test_aot.py

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	cd dist && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p palkernels
	cd dist && ../$(BIN)/lint-imports --no-cache --no-logo ../pyproject.toml

mutants: .venv/installed
	$(BLAS) $(BIN)/python tests/mutants/run.py

compat: .venv/compat
	PYTHONPATH=.venv/compat OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile tests/model

.venv/compat: .venv/installed
	rm -rf $@ $@.part
	PIP_CONSTRAINT= $(BIN)/pip install --quiet --target $@.part 'transformers==5.17.*' 'numpy<2.4'
	mv $@.part $@

# The wheel with its pinned dependencies; a changed source reinstalls the wheel alone.
.venv/installed: constraints.txt $(SOURCES)
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 must be on the PATH" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	rm -rf build *.egg-info
	$(BIN)/pip install --progress-bar on "$$(ls dist/palkernels-*.whl)[all]"
	$(BIN)/pip install --quiet --no-deps --force-reinstall dist/palkernels-*.whl
	touch $@

clean:
	rm -rf .venv build dist figure1-out figure1-all-out simulate-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
