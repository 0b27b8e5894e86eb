"""Compress a model with GPTQModel as its documentation shows, on given tokens. Runs in the peer's environment."""

import argparse
import os

# It stops on a machine of two cores otherwise.
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "tokens", "output", "dtype"):
        parser.add_argument(name)
    parser.add_argument("method", choices=["gptq"])
    parser.add_argument("bits", type=int)
    parser.add_argument("group_size", type=int)
    options = parser.parse_args()
    settings = QuantizeConfig(bits=options.bits, group_size=options.group_size, sym=True, device="cpu")
    model = GPTQModel.load(options.model, settings, dtype=getattr(torch, options.dtype))
    tokens = load_file(options.tokens)["tokens"].long()
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()], batch_size=4)
    model.save(options.output)


if __name__ == "__main__":
    main()
