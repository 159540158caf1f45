# make test     build, install into .venv and run the test suite
# make demo     distil the small teacher on real speech and let S3PRL consume the student
# make bench    time it against PyTorch, ONNX Runtime and OpenVINO
# make clean
#
# PYTHON=python3.11 chooses the interpreter, PIP_ARGS="..." passes options to every pip install,
# TORCH="torch==2.13.0" is the PyTorch that tests, demo and bench compare with; BENCH="--quick --memory" gives
# the benchmark options (benchmarks/speed.py --help).
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
TORCH ?= torch==2.13.0
TESTS ?= tests
BENCH ?=

PIP = $(VENV)/bin/python -m pip install $(PIP_ARGS) --disable-pip-version-check --quiet
SOURCES = $(shell find csrc cuda gendistiller_ext s3prl_upstream -type f -not -name '*.so' -not -path '*/__pycache__/*') \
	setup.py pyproject.toml

.PHONY: test demo bench clean

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
	cd $(VENV) && bin/pytest --rootdir="$(CURDIR)" -c "$(CURDIR)/pyproject.toml" \
		$(patsubst tests%,"$(CURDIR)"/tests%,$(TESTS))

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

clean:
	rm -rf build dist $(VENV) *.egg-info gendistiller_ext/*.so
