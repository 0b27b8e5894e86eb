"""GPT-OSS's own format: its fused experts in MXFP4, everything else dense.

Source: huggingface/transformers, ``integrations/mxfp4.py``.
"""

from collections.abc import Mapping
from typing import Any

import torch

from calibrant.formats.float_quantized import pack_e2m1, unpack_e2m1
from calibrant.formats.quantized import Codes, Layout

# Weights that share a power of two, and bytes of their numbers.
_GROUP, _GROUP_BYTES = 32, 16


class GptOssExperts:
    """The experts of a fused parameter, one below the other: ``_blocks`` uint8 ``[out, in / 32, 16]`` and ``_scales``
    uint8 ``[out, in / 32]``; files have a first dimension more, the experts'."""

    name = "mxfp4"

    def refusal(self, layout: Layout) -> str | None:
        return None

    def config(self, layouts: Mapping[Layout, list[str]], ignored: list[str]) -> dict[str, Any]:
        return {"quant_method": self.name, "modules_to_not_convert": ignored}

    def write(self, codes: Codes, layout: Layout) -> dict[str, torch.Tensor]:
        rows, columns = codes.codes.shape
        blocks = pack_e2m1(codes.codes).view(rows, columns // _GROUP, _GROUP_BYTES)
        return {"_blocks": blocks, "_scales": codes.scale.view(torch.uint8)}

    def read(self, tensors: dict[str, torch.Tensor], layout: Layout) -> Codes:
        blocks, scale = tensors["_blocks"], tensors["_scales"].flatten(0, -2).view(torch.float8_e8m0fnu)
        packed = blocks.reshape(-1, blocks.shape[-2] * blocks.shape[-1])
        return Codes(unpack_e2m1(packed), scale, torch.zeros(scale.shape, dtype=torch.int8))
