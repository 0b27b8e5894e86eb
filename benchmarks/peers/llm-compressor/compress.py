"""Compress a model with llm-compressor as its documentation shows, on given tokens. Runs in the peer's environment."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HEAD = ["lm_head"]
PRUNE = {"sparsity": 0.5, "mask_structure": "2:4", "targets": ["Linear"], "ignore": HEAD}


def grouped(bits: int, group_size: int) -> dict[str, Any]:
    """Symmetric weights in groups."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


METHODS: dict[str, Callable[[int, int], list[Any]]] = {
    "gptq": lambda bits, group: [GPTQModifier(ignore=HEAD, config_groups=grouped(bits, group))],
    "awq": lambda bits, group: [
        AWQModifier(),
        QuantizationModifier(ignore=HEAD, config_groups=grouped(bits, group)),
    ],
    "smoothquant": lambda bits, group: [
        SmoothQuantModifier(smoothing_strength=0.8),
        QuantizationModifier(targets="Linear", scheme="W8A8", ignore=HEAD),
    ],
    "rtn-fp8": lambda bits, group: [QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=HEAD)],
    "gptq-fp8": lambda bits, group: [GPTQModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=HEAD)],
    "gptq-nvfp4a16": lambda bits, group: [GPTQModifier(targets="Linear", scheme="NVFP4A16", ignore=HEAD)],
    "gptq-mxfp4a16": lambda bits, group: [GPTQModifier(targets="Linear", scheme="MXFP4A16", ignore=HEAD)],
    "sparsegpt": lambda bits, group: [SparseGPTModifier(**PRUNE)],
    "wanda": lambda bits, group: [WandaPruningModifier(**PRUNE)],
}


def run_without_gpu() -> None:
    """AWQ pins its cache for a GPU's sake, which stops it on a machine that has none."""
    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda self, batch_index: None


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "tokens", "output", "dtype"):
        parser.add_argument(name)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("bits", type=int)
    parser.add_argument("group_size", type=int)
    options = parser.parse_args()
    run_without_gpu()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = load_file(options.tokens)["tokens"].long()
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=METHODS[options.method](options.bits, options.group_size),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
