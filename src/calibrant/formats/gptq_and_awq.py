"""Codes of GPTQ (versions 1 and 2) and AWQ checkpoints, also from other tools."""

from typing import Any

import torch

from calibrant.errors import CalibrantError
from calibrant.formats.awq import Awq
from calibrant.formats.gptq import read_gptq
from calibrant.formats.quantized import READ_WIDTHS, Codes, Layout

_SUFFIX = "qweight"
_PARTS = (_SUFFIX, "qzeros", "scales", "g_idx")


def read_codes(base: str, parts: dict[str, torch.Tensor], settings: dict[str, Any]) -> Codes:
    """Codes of the linear ``base`` from its stored tensors by their last name.

    Raises:
        CalibrantError: the layout or bit width is not supported, a tensor is missing or does not fit, or groups are
            out of order.
    """
    _check_layout(settings)
    _check_tensors(base, parts, settings)
    bits = int(settings.get("bits", 4))
    if settings["quant_method"] == "awq":
        return Awq().read(parts, Layout(bits, False, None, None, "awq"))
    codes = read_gptq(parts, bits, version=2 if settings.get("checkpoint_format") == "gptq_v2" else 1)
    width = codes.codes.shape[1] // codes.scale.shape[1]
    if "g_idx" in parts and not torch.equal(parts["g_idx"], torch.arange(codes.codes.shape[1]) // width):
        raise CalibrantError(f"{base}: its groups are out of order (desc_act), which is not read here")
    return codes


def _check_layout(settings: dict[str, Any]) -> None:
    """Refuse unsupported layouts that use the same tensor names."""
    if settings["quant_method"] == "awq":
        version, bits = str(settings.get("version", "gemm")).lower(), settings.get("bits", 4)
        if version != "gemm" or bits != 4:
            raise CalibrantError(f"config.json: AWQ of version {version} with {bits} bits is not read; gemm with 4 is")
        return
    kind, bits = settings.get("checkpoint_format", "gptq"), settings.get("bits", 4)
    if kind not in ("gptq", "gptq_v2") or bits not in READ_WIDTHS:
        raise CalibrantError(
            f"config.json: GPTQ of checkpoint_format {kind} with {bits} bits is not read; "
            f"gptq and gptq_v2 with {', '.join(map(str, READ_WIDTHS))} bits are"
        )


def _check_tensors(base: str, parts: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    """Refuse a linear with a missing tensor or with tensors whose shapes do not match."""
    missing = [part for part in _PARTS[:3] if part not in parts]
    if missing:
        raise CalibrantError(f"{base}: its files lack {base}.{missing[0]}; copy or download the checkpoint again")
    bits = int(settings.get("bits", 4))
    scales, codes, zeros = (tuple(parts[part].shape) for part in ("scales", _SUFFIX, "qzeros"))
    if settings["quant_method"] == "awq":
        columns, fits = codes[0], codes[1] * 32 == scales[1] * bits
    else:
        columns, fits = codes[0] * 32 // bits, codes[1] == scales[1]
    fits = fits and zeros == (scales[0], -(-scales[1] * bits // 32)) and columns % scales[0] == 0
    fits = fits and ("g_idx" not in parts or len(parts["g_idx"]) == columns)
    if not fits:
        raise CalibrantError(
            f"{base}: the shapes of its tensors do not fit {bits} bits and each other; "
            "copy or download the checkpoint again, config.json too"
        )
