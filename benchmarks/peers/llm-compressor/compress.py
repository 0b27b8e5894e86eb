"""Compress a model with llm-compressor as its documentation shows, on given tokens. Runs in the peer's environment."""

import argparse

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP_64 = {
    "group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64},
    }
}
PRUNE = {"sparsity": 0.5, "mask_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]}
METHODS = {
    "gptq-w4a16-g64": lambda: GPTQModifier(ignore=["lm_head"], config_groups=GROUP_64),
    "sparsegpt-2:4": lambda: SparseGPTModifier(**PRUNE),
    "wanda-2:4": lambda: WandaPruningModifier(**PRUNE),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "tokens", "output", "dtype"):
        parser.add_argument(name)
    parser.add_argument("method", choices=METHODS)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = load_file(options.tokens)["tokens"].long()
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=METHODS[options.method](),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
