"""The compressed-tensors formats ``pack-quantized`` and ``int-quantized``.

Source: vllm-project/compressed-tensors, ``compressors/pack_quantized`` and ``compressors/naive_quantized``.
"""

from collections.abc import Mapping
from typing import Any

import torch

from calibrant.formats.compressed_tensors_config import quantization_config
from calibrant.formats.packing import pack, unpack
from calibrant.formats.quantized import Codes, Layout


class PackQuantized:
    """Weight-only quantization; codes are packed into int32 words."""

    name = "pack-quantized"

    def refusal(self, layout: Layout) -> str | None:
        return None

    def config(self, layouts: Mapping[Layout, list[str]], ignored: list[str]) -> dict[str, Any]:
        return quantization_config(self.name, layouts, ignored)

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
        return quantization_config(self.name, layouts, ignored)

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
        return Codes(
            tensors["weight"],
            scale,
            zero_point,
            input_scale=tensors.get("input_scale"),
            input_zero_point=tensors.get("input_zero_point"),
        )
