"""GPTQ checkpoints: writes version 1, reads versions 1 and 2 (GPTQModel, ``nn_modules/qlinear/__init__.py``)."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from calibrant.formats.packing import pack, unpack
from calibrant.formats.quantized import Codes, Layout


class Gptq:
    """Codes packed along the inputs, zero points minus one packed along the outputs, float16 scales (version 1)."""

    name = "gptq"

    def refusal(self, layout: Layout) -> str | None:
        if not layout.symmetric:
            return "the gptq format stores zeros less one, which 0 does not survive: take symmetric weights"
        return None

    def write(self, codes: Codes, layout: Layout) -> dict[str, torch.Tensor]:
        bits, columns = layout.stored_bits, codes.codes.shape[1]
        width = layout.group_size or columns
        return {
            "qweight": pack(codes.codes, bits).T.contiguous(),
            "qzeros": pack((codes.zero_point - 1).T.contiguous(), bits),
            "scales": codes.scale.T.contiguous(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // width,
        }

    def read(self, tensors: dict[str, torch.Tensor], layout: Layout) -> Codes:
        return read_gptq(tensors, layout.stored_bits, version=1)

    def config(self, layouts: Mapping[Layout, list[str]], ignored: list[str]) -> dict[str, Any]:
        (layout,) = layouts
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": layout.stored_bits,
            "group_size": layout.group_size or -1,
            "desc_act": False,  # columns stay in order, even if the solver used another order
            "sym": layout.symmetric,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "meta": {"quantizer": ["calibrant"], "static_groups": True},
        }
        inside = [name for name in ignored if name != "lm_head"]
        if inside:
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in inside}
        return config


def read_gptq(tensors: dict[str, torch.Tensor], bits: int, version: int) -> Codes:
    """Codes from ``qweight``, ``qzeros`` and ``scales``, for groups of consecutive columns.

    Version 1 stores zero points minus one, version 2 as they are.
    """
    scales = tensors["scales"]
    rows, columns = scales.shape[1], tensors["qweight"].shape[0] * 32 // bits
    codes = unpack(tensors["qweight"].T.contiguous(), bits, columns)
    zero_point = unpack(tensors["qzeros"], bits, rows).T.contiguous()
    return Codes(codes, scales.T.contiguous(), zero_point + 1 if version == 1 else zero_point)
