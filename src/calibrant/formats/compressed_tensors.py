"""The compressed-tensors formats ``pack-quantized`` and ``int-quantized``.

Source: vllm-project/compressed-tensors, ``compressors/pack_quantized`` and ``compressors/naive_quantized``.
"""

from collections.abc import Mapping
from typing import Any

import torch

from calibrant.formats.packing import pack, unpack
from calibrant.formats.quantized import Codes, Layout


class PackQuantized:
    """Weight-only quantization; codes are packed into int32 words."""

    name = "pack-quantized"

    def refusal(self, layout: Layout) -> str | None:
        return None

    def config(self, layouts: Mapping[Layout, list[str]], ignored: list[str]) -> dict[str, Any]:
        return _config(self.name, layouts, ignored)

    def write(self, codes: Codes, layout: Layout) -> dict[str, torch.Tensor]:
        tensors = {
            "weight_packed": pack(codes.codes, layout.stored_bits),
            "weight_scale": codes.scale,
            "weight_shape": torch.tensor(codes.codes.shape, dtype=torch.int64),
        }
        if not layout.symmetric:
            tensors["weight_zero_point"] = pack(codes.zero_point.T.contiguous(), layout.stored_bits).T.contiguous()
        return tensors

    def read(self, tensors: dict[str, torch.Tensor], layout: Layout) -> Codes:
        rows, columns = tensors["weight_shape"].tolist()
        scale = tensors["weight_scale"]
        if layout.symmetric:
            zero_point = torch.zeros(scale.shape, dtype=torch.int8)
        else:
            zero_point = unpack(tensors["weight_zero_point"].T.contiguous(), layout.stored_bits, rows).T.contiguous()
        return Codes(unpack(tensors["weight_packed"], layout.stored_bits, columns), scale, zero_point)


class IntQuantized:
    """Weights as int8 tensors, for integer products with int8 activations."""

    name = "int-quantized"

    def refusal(self, layout: Layout) -> str | None:
        return None

    def config(self, layouts: Mapping[Layout, list[str]], ignored: list[str]) -> dict[str, Any]:
        return _config(self.name, layouts, ignored)

    def write(self, codes: Codes, layout: Layout) -> dict[str, torch.Tensor]:
        tensors = {"weight": codes.codes, "weight_scale": codes.scale}
        if not layout.symmetric:
            tensors["weight_zero_point"] = codes.zero_point
        if codes.input_scale is not None and codes.input_zero_point is not None:
            tensors |= {"input_scale": codes.input_scale, "input_zero_point": codes.input_zero_point}
        return tensors

    def read(self, tensors: dict[str, torch.Tensor], layout: Layout) -> Codes:
        scale = tensors["weight_scale"]
        zero_point = tensors.get("weight_zero_point", torch.zeros(scale.shape, dtype=torch.int8))
        return Codes(tensors["weight"], scale, zero_point, tensors.get("input_scale"), tensors.get("input_zero_point"))


def _config(name: str, layouts: Mapping[Layout, list[str]], ignored: list[str]) -> dict[str, Any]:
    groups = {}
    for number, (layout, linears) in enumerate(layouts.items()):
        targets = ["Linear"] if len(layouts) == 1 else linears
        groups[f"group_{number}"] = _group(name, layout, targets)
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": groups,
    }


def _group(name: str, layout: Layout, targets: list[str]) -> dict[str, Any]:
    activations: dict[str, Any] | None = None
    if layout.activations == "dynamic":
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    elif layout.activations == "static":
        activations = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
    weights: dict[str, Any] = {
        "num_bits": layout.stored_bits,
        "type": "int",
        "symmetric": layout.symmetric,
        "strategy": "group" if layout.group_size else "channel",
        "dynamic": False,
    }
    if layout.group_size:
        weights["group_size"] = layout.group_size
    return {
        "targets": targets,
        "format": name,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
