"""Compress a model with auto-round as its documentation shows, on given tokens. Runs in the peer's environment."""

import argparse
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# Its recipes "light" and "default"; the second takes an hour for a small model on two cores.
RECIPES = {"light": {"iters": 50, "lr": 5e-3}, "default": {"iters": 200}}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "tokens", "output", "dtype"):
        parser.add_argument(name)
    parser.add_argument("method", choices=RECIPES)
    parser.add_argument("bits", type=int)
    parser.add_argument("group_size", type=int)
    options = parser.parse_args()
    tokens = load_file(options.tokens)["tokens"].long()
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)),
        AutoTokenizer.from_pretrained(options.model),
        bits=options.bits,
        group_size=options.group_size,
        sym=True,
        **RECIPES[options.method],
        dataset=[row[None] for row in tokens],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map="cpu",
    )
    # It writes a folder of its own choice inside the one it is given.
    with tempfile.TemporaryDirectory(dir=Path(options.output).parent) as folder:
        rounding.quantize_and_save(folder, format="auto_gptq")
        next(path.parent for path in Path(folder).rglob("config.json")).rename(options.output)


if __name__ == "__main__":
    main()
