"""Load a checkpoint with GPTQModel on a CPU and write its logits for given tokens. Runs in the peer's environment."""

import argparse
import os

# It stops on a machine of two cores otherwise.
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file, save_file


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "tokens", "output"):
        parser.add_argument(name)
    parser.add_argument("backend", choices=["GPTQ_TORCH", "AWQ_TORCH"])
    options = parser.parse_args()
    model = GPTQModel.load(options.model, device="cpu", backend=BACKEND[options.backend], dtype=torch.float16)
    kernels = {type(module).__name__ for module in model.model.modules() if "TorchLinear" in type(module).__name__}
    with torch.no_grad():
        logits = model.model(input_ids=load_file(options.tokens)["tokens"]).logits.float()
    save_file({"logits": logits.contiguous()}, options.output)
    print("kernels:", *sorted(kernels))


if __name__ == "__main__":
    main()
