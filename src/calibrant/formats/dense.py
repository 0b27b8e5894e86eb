"""Dense weights out of quantized checkpoints that no loader on a plain machine opens: GPTQ (1 and 2) and AWQ."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from calibrant.errors import CalibrantError
from calibrant.formats.awq import Awq
from calibrant.formats.gptq import read_gptq
from calibrant.formats.quantized import Codes, Layout

_SUFFIX = "qweight"
_PARTS = (_SUFFIX, "qzeros", "scales", "g_idx")


def dense_weights(
    names: Iterable[str], read: Callable[[str], torch.Tensor], settings: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, quantized linears as ``weight`` ``[out, in]`` in the dtype of their scales.

    ``settings`` is the ``quantization_config`` of its ``config.json``.

    Raises:
        CalibrantError: the checkpoint is of a kind that is not read here.
    """
    known = set(names)
    dense = {}
    for name in sorted(known):
        base, _, suffix = name.rpartition(".")
        if suffix == _SUFFIX:
            parts = {part: read(f"{base}.{part}") for part in _PARTS if f"{base}.{part}" in known}
            dense[f"{base}.weight"] = _decoded(_codes(base, parts, settings))
        elif f"{base}.{_SUFFIX}" not in known or suffix not in _PARTS:
            dense[name] = read(name)
    return dense


def _codes(base: str, parts: dict[str, torch.Tensor], settings: dict[str, Any]) -> Codes:
    bits = int(settings.get("bits", 4))
    if settings["quant_method"] == "awq":
        return Awq().read(parts, Layout(bits, False, None, None, "awq"))
    codes = read_gptq(parts, bits, version=2 if settings.get("checkpoint_format") == "gptq_v2" else 1)
    width = codes.codes.shape[1] // codes.scale.shape[1]
    if "g_idx" in parts and not torch.equal(parts["g_idx"], torch.arange(codes.codes.shape[1]) // width):
        raise CalibrantError(f"{base}: its groups are out of order (desc_act), which is not read here")
    return codes


def _decoded(codes: Codes) -> torch.Tensor:
    width = codes.codes.shape[1] // codes.scale.shape[1]
    scale, zero = (values.repeat_interleave(width, dim=1) for values in (codes.scale, codes.zero))
    # The difference of two int8 may need nine bits.
    return ((codes.codes.to(scale.dtype) - zero.to(scale.dtype)) * scale).contiguous()
