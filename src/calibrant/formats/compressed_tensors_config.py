"""The ``quantization_config`` of compressed-tensors checkpoints.

Source: vllm-project/compressed-tensors, ``quantization/quant_args.py`` and ``quant_scheme.py``.
"""

from collections.abc import Mapping
from typing import Any

from calibrant.formats.quantized import BLOCK_SIZE, Layout

# Scales of the weights and of the inputs of four-bit floats.
_SCALES = {
    "mxfp4": {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"},
    "nvfp4": {
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
        "zp_dtype": "torch.float8_e4m3fn",
    },
}


def quantization_config(name: str, layouts: Mapping[Layout, list[str]], ignored: list[str]) -> dict[str, Any]:
    """The block of ``config.json`` for the format ``name``; arguments as in ``WeightFormat.config``."""
    groups = {}
    for number, (layout, linears) in enumerate(layouts.items()):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(layouts) == 1 else linears,
            "format": name,
            "weights": _weights(layout),
            "input_activations": _inputs(layout),
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": groups,
    }


def add_group(settings: dict[str, Any], layout: Layout, linear: str) -> None:
    """Add to ``settings``, which ``quantization_config`` made, a group of the packed ``linear`` alone.

    Loaders look for groups by names of modules first, so that it is in no group of a class.
    """
    group = quantization_config(settings["format"], {layout: [linear]}, [])["config_groups"]["group_0"]
    settings["config_groups"][f"group_{len(settings['config_groups'])}"] = {**group, "targets": [linear]}


def _weights(layout: Layout) -> dict[str, Any]:
    if layout.type in _SCALES:
        return {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False, **_SCALES[layout.type]}
    found: dict[str, Any] = {
        "num_bits": layout.stored_bits,
        "type": "int" if layout.type == "int" else "float",
        "symmetric": layout.symmetric,
        "strategy": "group" if layout.group_size else layout.granularity,
        "dynamic": False,
    }
    if layout.group_size:
        found["group_size"] = layout.group_size
    elif layout.granularity == "block":
        found["block_structure"] = [BLOCK_SIZE, BLOCK_SIZE]
    return found


def _inputs(layout: Layout) -> dict[str, Any] | None:
    dynamic = layout.activations == "dynamic"
    if layout.activations is None:
        return None
    if layout.input_type == "nvfp4":
        return {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": "local", **_SCALES["nvfp4"]}
    if layout.input_type == "mxfp4":
        return {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": True, **_SCALES["mxfp4"]}
    if layout.input_type == "fp8":
        found = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": dynamic}
        if layout.granularity == "block":
            return {**found, "strategy": "group", "group_size": BLOCK_SIZE}
        return {**found, "strategy": "token" if dynamic else "tensor"}
    # Integers of tokens are symmetric, static ones are not.
    strategy = "token" if dynamic else "tensor"
    return {"num_bits": 8, "type": "int", "symmetric": dynamic, "strategy": strategy, "dynamic": dynamic}
