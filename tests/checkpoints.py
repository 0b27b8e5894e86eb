"""What an output folder stores: put into a model by this project's own reading of the format, or loaded by others."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from calibrant.formats.compressed_tensors import PackQuantized
from calibrant.formats.quantized import Layout
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.losses import divergences
from calibrant.modeling.whole_model import load_whole
from calibrant.quantization.grids import Grid, GridSpec, decode


def put_stored_weights(model: torch.nn.Module, output: Path, group_size: int) -> None:
    """Overwrite the weights of ``model`` with those of ``output``: symmetric 4-bit codes decoded, or dense values."""
    stored = load_file(output / "model.safetensors")
    for name, module in model.named_modules():
        tensors = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        if "weight_scale" in tensors:
            codes = PackQuantized().read(tensors, Layout(4, True, group_size, None))
            spec = GridSpec(4, True, group_size, torch.float32)
            module.weight.data = decode(codes.codes, Grid(spec, codes.scale.float(), codes.zero_point.float()))
        elif "weight" in tensors:
            module.weight.data = tensors["weight"]
        if "bias" in tensors:
            module.bias.data = tensors["bias"]


def loaded_divergence(output: Path, original: Path, rows: torch.Tensor) -> float:
    """Mean divergence on token ids ``[rows, length]``, both models loaded by transformers, in float32."""
    first = load_whole(ModelFolder(original), "cpu", "float32")
    second = load_whole(ModelFolder(output, allow_quantized=True), "cpu", "float32")
    with torch.no_grad():
        return float(divergences(first(input_ids=rows).logits, second(input_ids=rows).logits).mean())
