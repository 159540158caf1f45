# make test     build, install into .venv and run the test suite
# make test-all  that, then operations and binding under sanitizers, fuzzing, and how much of the C code tests reach
# make demo     distil the small teacher on real speech and let S3PRL consume the student
# make bench    time it against PyTorch, ONNX Runtime and OpenVINO
# make lib      the C library without Python: build/lib/libgendistiller.so and .a (csrc/gendistiller.h is its header)
# make ops      build/ops/ops, which tests and times each operation
# make clean
#
# PYTHON=python3.11 chooses the interpreter, PIP_ARGS="..." passes options to every pip install,
# TORCH="torch==2.13.0" is the PyTorch that tests, demo and bench compare with; BENCH="--quick --memory" gives
# the benchmark options (benchmarks/speed.py --help); --all is everything. WORKERS=4 has as many files of tests run at
# once; 0 is all in one process.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
TORCH ?= torch==2.13.0
TESTS ?= tests
WORKERS ?= 2
BENCH ?=

PIP = $(VENV)/bin/python -m pip install $(PIP_ARGS) --disable-pip-version-check --quiet
SOURCES = $(shell find csrc cuda gendistiller_ext s3prl_upstream -type f -not -name '*.so' -not -path '*/__pycache__/*') \
	setup.py pyproject.toml

.PHONY: test test-all sanitized races coverage demo bench lib ops clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Extras come with the package, as a wheel: an editable install would not register the S3PRL upstream.
$(VENV)/test.stamp: $(VENV)/bin/python $(SOURCES)
	$(PIP) "$(TORCH)"
	$(PIP) ".[test]"
	@touch $@

$(VENV)/demo.stamp: $(VENV)/bin/python $(SOURCES)
	$(PIP) "$(TORCH)"
	$(PIP) ".[train,s3prl]"
	@touch $@

# From another folder, so that programs that tests start import the installed package, not the sources.
test: $(VENV)/test.stamp
	cd $(VENV) && bin/pytest --rootdir="$(CURDIR)" -c "$(CURDIR)/pyproject.toml" -n $(WORKERS) --dist loadfile --durations=10 \
		$(patsubst tests%,"$(CURDIR)"/tests%,$(TESTS))

# Instrumented builds are made in copies of the sources, so that they replace nothing. Tests that measure memory or
# time, or import PyTorch, are not for them.
INSTRUMENTED = test_binding test_binding_fuzz test_config_fuzz test_binding_values test_exact test_threads test_stream \
	test_checkpoint_damage test_checkpoint_fuzz test_checkpoint_int8 test_state
COVERED = $(INSTRUMENTED) test_checkpoint test_gradients test_precision test_curve test_optimizer test_presets
PYTEST = "$(abspath $(VENV))"/bin/python -m pytest -q -p no:cacheprovider --capture=sys
SANITIZERS = -fsanitize=address,undefined -fno-sanitize-recover=all

comma := ,

define copy
	rm -rf build/$(1) && mkdir -p build/$(1)
	cp -r setup.py pyproject.toml README.md LICENSE csrc cuda gendistiller_ext s3prl_upstream tests benchmarks build/$(1)
	rm -f build/$(1)/gendistiller_ext/*.so
	$(PIP) setuptools
	cd build/$(1) && GENDISTILLER_CUDA=0 $(2) "$(abspath $(VENV))"/bin/python setup.py --quiet build_ext --inplace
endef
library = $(shell $(CC) -print-file-name=$(1))

test-all: test
	$(MAKE) sanitized
	$(MAKE) races
	$(MAKE) coverage

sanitized: $(VENV)/test.stamp
	$(call copy,sanitized,GENDISTILLER_SANITIZE=address$(comma)undefined)
	cd build/sanitized && LD_PRELOAD="$(call library,libasan.so)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		$(PYTEST) $(INSTRUMENTED:%=tests/%.py)
	cd build/sanitized && CC="$(CC) $(SANITIZERS)" $(PYTEST) tests/test_ops.py

# Without fork(), which ThreadSanitizer does not follow, and long audio.
races: $(VENV)/test.stamp
	$(call copy,races,GENDISTILLER_SANITIZE=thread)
	cd build/races && LD_PRELOAD="$(call library,libtsan.so)" \
		$(PYTEST) tests/test_threads.py -k "not fork and not gil and not cores"
	cd build/races && CC="$(CC) -fsanitize=thread" $(PYTEST) tests/test_ops.py -k test_threads

coverage: $(VENV)/test.stamp
	$(PIP) gcovr
	$(call copy,coverage,CFLAGS="--coverage -fprofile-update=atomic" LDFLAGS=--coverage)
	cd build/coverage && $(PYTEST) $(COVERED:%=tests/%.py)
	cd build/coverage && "$(abspath $(VENV))"/bin/gcovr --filter csrc/ --html-details coverage.html --txt \
		--gcov-ignore-parse-errors=suspicious_hits.warn_once_per_file

demo: $(VENV)/demo.stamp
	rm -rf build/demo
	$(VENV)/bin/gendistiller demo $(if $(AUDIO),--audio "$(AUDIO)") $(if $(DATA),--data "$(DATA)") \
		$(if $(PIP_ARGS),--pip-args="$(PIP_ARGS)") --out build/demo

$(VENV)/bench.stamp: $(VENV)/bin/python $(SOURCES)
	$(PIP) "$(TORCH)"
	$(PIP) ".[bench]"
	@touch $@

bench: $(VENV)/bench.stamp
	$(VENV)/bin/python benchmarks/speed.py $(BENCH) --out build/bench

# The library's sources take no flags but these, on any machine: csrc/cpu/isa.h.
LIBRARY = $(wildcard csrc/*.c csrc/cpu/*.c)
HEADERS = $(wildcard csrc/*.h csrc/*.def csrc/cpu/*.h)
LIBRARY_FLAGS = -std=gnu11 -O3 -ffp-contract=fast -fPIC -pthread $(CFLAGS)

lib: build/lib/libgendistiller.so build/lib/libgendistiller.a

build/lib/%.o: csrc/%.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(LIBRARY_FLAGS) -fvisibility=hidden -DGD_EXPORT -DNDEBUG -c $< -o $@

build/lib/libgendistiller.so: $(LIBRARY:csrc/%.c=build/lib/%.o)
	$(CC) -shared -pthread $^ -lm -ldl -o $@

build/lib/libgendistiller.a: $(LIBRARY:csrc/%.c=build/lib/%.o)
	rm -f $@
	$(AR) rcs $@ $^

ops: build/ops/ops

build/ops/ops: $(wildcard tests/ops/*.c tests/ops/*.h) build/lib/libgendistiller.a
	@mkdir -p $(@D)
	$(CC) $(LIBRARY_FLAGS) $(filter %.c %.a,$^) -lm -ldl -o $@

clean:
	rm -rf build dist $(VENV) *.egg-info gendistiller_ext/*.so
