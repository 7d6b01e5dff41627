# make figure1      measure Figure 1 on the bundled clip, into figure1-out/
# make figure1-all  measure it with every method, into figure1-all-out/
# make demo         ask a model that comes trained three questions about sounds
# make study        how fast each method learns: hours on two cores, resumable, into study-out/
# make simulate     predict Figure 1 at full size for two GPUs, without a GPU, into simulate-out/
# make lint         format, types and the direction of imports, on the installed wheel
# make test         format, then types and imports beside the tests, on the installed wheel, with the newest versions
#                   (constraints.txt); of what can be combined every pair, not everything (tests/lib/support/thorough.py)
# make test-slow    the tests that make test leaves out: what is trained, compiled or started in many processes
# make test-oldest  the tests of kernels and models with the oldest ones (constraints-oldest.txt), in .venv-oldest;
#                   everything that can be combined
# make test-serving the tests of serving with vLLM, in .venv-serving (constraints-serving.txt)
# make aot          compile every tile in every dtype for sm_80, sm_90 and sm_100 (make test-slow: bfloat16, some of them)
# make mutants      run seeded faults in the kernels, which the tests must catch, into tests/mutants/outcome.json
# make clean        remove everything that these made

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
OLDEST := .venv-oldest/bin
SERVING ?= .venv-serving
SOURCES := pyproject.toml README.md LICENSE $(shell find palkernels model bench -type f \
	-not -path '*/__pycache__/*' -not -path 'bench/results/*')
# Triton's interpreter multiplies with NumPy, and NumPy with the OpenBLAS kernels of the processor. Some of these sum less
# exactly than PyTorch, whose products the tests compare with.
BLAS := $(if $(shell grep -m 1 -o avx512f /proc/cpuinfo 2>/dev/null),OPENBLAS_CORETYPE=SkylakeX)
# Two workers, a file to each: what a file makes once is made once. In the order of the files: by the number of tests,
# which is the default, files of few but long tests would come last.
pytest = OMP_NUM_THREADS=1 $(BLAS) $(1)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
types = cd dist && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p palkernels && \
	../$(BIN)/lint-imports --no-cache --no-logo ../pyproject.toml
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.NOTPARALLEL:
.PHONY: figure1 figure1-all demo study simulate test test-slow test-oldest test-serving lint style aot mutants clean

figure1: .venv/installed
	$(BIN)/palkernels figure1

figure1-all: .venv/installed
	$(BIN)/palkernels figure1 --methods all --out figure1-all-out

demo: .venv/installed
	$(BIN)/palkernels demo

study: .venv/installed
	$(BIN)/palkernels study

simulate: .venv/installed
	$(BIN)/palkernels simulate

# The types take half a minute on one core where nothing is known of them yet.
test: style
	log=$$(mktemp); ($(types)) > $$log 2>&1 & types=$$!; \
	PALKERNELS_TEST_WHEEL=1 $(call pytest,$(BIN)) -m 'not slow'; tests=$$?; \
	wait $$types; types=$$?; cat $$log; rm $$log; exit $$((tests || types))

test-slow: .venv/installed
	PALKERNELS_TEST_WHEEL=1 $(call pytest,$(BIN)) -m slow

test-oldest: .venv-oldest/installed
	PALKERNELS_TESTS=all PALKERNELS_TEST_WHEEL=1 $(call pytest,$(OLDEST)) tests/attention tests/kernels tests/projection tests/model

# Without the other tests' conftest.py: vLLM chooses for itself what runs in Triton's interpreter.
test-serving: $(SERVING)/installed
	OMP_NUM_THREADS=1 $(SERVING)/bin/python -P -m pytest --confcutdir tests/serving tests/serving

aot: .venv/installed
	PALKERNELS_AOT=all $(BIN)/pytest tests/kernels/test_aot.py

lint: style
	$(types)

style: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

mutants: .venv/installed
	PALKERNELS_TESTS=all $(BLAS) $(BIN)/python tests/mutants/run.py

.venv-oldest/installed: export PIP_CONSTRAINT := $(CURDIR)/constraints-oldest.txt
.venv/installed: constraints.txt
.venv-oldest/installed: constraints-oldest.txt
# Installs the wheel and its pinned dependencies; after a change of the sources it reinstalls the wheel alone.
.venv/installed .venv-oldest/installed: $(SOURCES)
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer must be on the PATH" >&2; exit 1; }
	test -x $(@D)/bin/pip || $(PYTHON) -m venv $(@D)
	rm -rf build dist
	$(@D)/bin/pip wheel --quiet --no-deps --wheel-dir dist .
	rm -rf build *.egg-info
	$(@D)/bin/pip install --progress-bar on "$$(ls dist/palkernels-*.whl)[all]"
	$(@D)/bin/pip install --quiet --no-deps --force-reinstall dist/palkernels-*.whl
	$(@D)/bin/pip install --quiet --no-deps -r demo-packages.txt
	touch $@

$(SERVING)/packages: export PIP_CONSTRAINT :=
# PyPI's torchaudio is built for CUDA, and does not load beside torch for CPUs; its Python, all that is used, does.
$(SERVING)/packages: constraints-serving.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer must be on the PATH" >&2; exit 1; }
	test -x $(@D)/bin/pip || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --progress-bar on --no-deps -r constraints-serving.txt
	rm -f $(@D)/lib/python*/site-packages/torchaudio/lib/*.so
	touch $@

$(SERVING)/installed: $(SERVING)/packages $(SOURCES)
	rm -rf build
	$(@D)/bin/pip install --quiet --no-deps --force-reinstall .
	rm -rf build *.egg-info
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-serving build dist figure1-out figure1-all-out simulate-out study-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
