"""The compressed-tensors formats ``float-quantized``, ``mxfp4-pack-quantized`` and ``nvfp4-pack-quantized``.

Source: vllm-project/compressed-tensors, ``compressors/naive_quantized``, ``compressors/mxfp4``, ``compressors/nvfp4``.
"""

from collections.abc import Mapping
from typing import Any

import torch

from calibrant.formats.compressed_tensors_config import quantization_config
from calibrant.formats.quantized import Codes, Layout
from calibrant.kernels.number_types import E2M1_NUMBERS, E4M3, decoded_floats


class FloatQuantized:
    """Weights as E4M3 tensors."""

    name = "float-quantized"

    def refusal(self, layout: Layout) -> str | None:
        return None

    def config(self, layouts: Mapping[Layout, list[str]], ignored: list[str]) -> dict[str, Any]:
        return quantization_config(self.name, layouts, ignored)

    def write(self, codes: Codes, layout: Layout) -> dict[str, torch.Tensor]:
        scale = codes.scale.flatten() if layout.granularity == "tensor" else codes.scale
        found = {"weight": codes.codes.view(torch.float8_e4m3fn), "weight_scale": scale}
        if codes.input_scale is not None:
            found["input_scale"] = codes.input_scale
        return found

    def read(self, tensors: dict[str, torch.Tensor], layout: Layout) -> Codes:
        scale = tensors["weight_scale"]
        scale = scale.view(1, 1) if layout.granularity == "tensor" else scale
        zero_point = torch.zeros(scale.shape, dtype=torch.int8)
        return Codes(tensors["weight"].view(torch.int8), scale, zero_point, input_scale=tensors.get("input_scale"))


class MxFp4Packed:
    """Weights as pairs of E2M1 numbers, with a power of two for each 32."""

    name = "mxfp4-pack-quantized"

    def refusal(self, layout: Layout) -> str | None:
        return None

    def config(self, layouts: Mapping[Layout, list[str]], ignored: list[str]) -> dict[str, Any]:
        return quantization_config(self.name, layouts, ignored)

    def write(self, codes: Codes, layout: Layout) -> dict[str, torch.Tensor]:
        return {"weight_packed": pack_e2m1(codes.codes), "weight_scale": codes.scale.view(torch.uint8)}

    def read(self, tensors: dict[str, torch.Tensor], layout: Layout) -> Codes:
        scale = tensors["weight_scale"].view(torch.float8_e8m0fnu)
        return Codes(unpack_e2m1(tensors["weight_packed"]), scale, torch.zeros(scale.shape, dtype=torch.int8))


class NvFp4Packed:
    """Weights as pairs of E2M1 numbers, with an E4M3 scale for each 16 and one scale that divides those."""

    name = "nvfp4-pack-quantized"

    def refusal(self, layout: Layout) -> str | None:
        return None

    def config(self, layouts: Mapping[Layout, list[str]], ignored: list[str]) -> dict[str, Any]:
        return quantization_config(self.name, layouts, ignored)

    def write(self, codes: Codes, layout: Layout) -> dict[str, torch.Tensor]:
        assert codes.global_scale is not None
        found = {
            "weight_packed": pack_e2m1(codes.codes),
            "weight_scale": codes.scale,
            "weight_global_scale": codes.global_scale,
        }
        if codes.input_scale is not None:
            found["input_global_scale"] = codes.input_scale
        return found

    def read(self, tensors: dict[str, torch.Tensor], layout: Layout) -> Codes:
        scale = tensors["weight_scale"]
        return Codes(
            unpack_e2m1(tensors["weight_packed"]),
            scale,
            torch.zeros(scale.shape, dtype=torch.int8),
            global_scale=tensors["weight_global_scale"],
            input_scale=tensors.get("input_global_scale"),
        )


def pack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """E2M1 ``codes`` (int8 ``[out, in]``) as uint8 ``[out, in / 2]``: the first of a pair in the low four bits."""
    numbers = decoded_floats(codes)
    bits = torch.searchsorted(E2M1_NUMBERS, numbers.abs()).to(torch.uint8) | (numbers.signbit().to(torch.uint8) << 3)
    return bits[:, ::2] | (bits[:, 1::2] << 4)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of ``pack_e2m1``."""
    bits = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    magnitudes = E2M1_NUMBERS[(bits & 7).long()]
    return E4M3.codes_of(torch.where(bits & 8 > 0, -magnitudes, magnitudes))
