PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

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

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist
