"""The codes of a finished quantized checkpoint, whatever its format, and the weights they stand for."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from calibrant.errors import CalibrantError
from calibrant.formats.compressed_tensors import IntQuantized, PackQuantized
from calibrant.formats.float_quantized import FloatQuantized, MxFp4Packed, NvFp4Packed
from calibrant.formats.gguf_blocks import GgufBlocks
from calibrant.formats.gguf_types import GGUF_TYPES
from calibrant.formats.gptq_and_awq import read_codes
from calibrant.formats.kv_cache import cache_scales
from calibrant.formats.quantized import BLOCK_SIZE, FLOAT_TYPES, Codes, Granularity, Layout, WeightFormat, WeightType
from calibrant.kernels.number_types import decoded_floats

# Of each format, the tensor that only quantized linears have.
_MARKS = {
    "gptq": "qweight",
    "awq": "qweight",
    "pack-quantized": "weight_packed",
    "int-quantized": "weight_scale",
    "float-quantized": "weight_scale",
    "mxfp4-pack-quantized": "weight_packed",
    "nvfp4-pack-quantized": "weight_packed",
    GgufBlocks.name: "weight_blocks",
    "fp8": "weight_scale_inv",
}
_FORMATS: dict[str, WeightFormat] = {
    one.name: one
    for one in (PackQuantized(), IntQuantized(), FloatQuantized(), MxFp4Packed(), NvFp4Packed(), GgufBlocks())
}
_TYPES: dict[str, WeightType] = {
    "float-quantized": "fp8",
    "mxfp4-pack-quantized": "mxfp4",
    "nvfp4-pack-quantized": "nvfp4",
}


def quantized_linears(names: Iterable[str], settings: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """The stored tensors of every quantized linear by the linear's name.

    ``names`` lists the stored tensors; ``settings`` is the ``quantization_config`` of ``config.json``, None without.
    """
    if settings is None:
        return {}
    mark, known = _MARKS[stored_format(settings)], set(names)
    linears = {name.removesuffix(f".{mark}") for name in known if name.endswith(f".{mark}")}
    found: dict[str, list[str]] = {linear: [] for linear in sorted(linears)}
    for name in known:
        linear, _, suffix = name.rpartition(".")
        if linear in found and suffix != "bias":
            found[linear].append(name)
    return found


def stored_codes(
    linear: str, tensors: Iterable[str], read: Callable[[str], torch.Tensor], settings: Mapping[str, Any]
) -> Codes:
    """The codes of ``linear``, whose stored ``tensors`` ``read`` loads.

    Raises:
        CalibrantError: the format is not one of ours, or a tensor is missing or does not fit.
    """
    parts = {name.rpartition(".")[2]: read(name) for name in tensors}
    kind = stored_format(settings)
    if kind in ("gptq", "awq"):
        return read_codes(linear, parts, dict(settings))
    if kind == "fp8":
        scale = parts["weight_scale_inv"].float()
        return Codes(parts["weight"].view(torch.int8), scale, torch.zeros(scale.shape, dtype=torch.int8))
    return _FORMATS[kind].read(parts, stored_layout(linear, settings))


def stored_layout(linear: str, settings: Mapping[str, Any]) -> Layout:
    """The layout of ``linear`` in a checkpoint of compressed-tensors or of GGUF blocks."""
    if stored_format(settings) == GgufBlocks.name:
        kind = settings["types"][linear]
        known = GGUF_TYPES[kind]
        return Layout(known.bits, not known.minima, known.group_size, format="gguf", type=kind)
    weights = settings_of(linear, settings)["weights"]
    granularity: Granularity = "channel"
    if weights["strategy"] in ("tensor", "block"):
        granularity = weights["strategy"]
    kind = _TYPES.get(stored_format(settings), "int")
    symmetric = bool(weights["symmetric"])
    return Layout(int(weights["num_bits"]), symmetric, weights.get("group_size"), type=kind, granularity=granularity)


def settings_of(linear: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group of a compressed-tensors configuration that ``linear`` is in."""
    groups: list[Mapping[str, Any]] = list(settings["config_groups"].values())
    if len(groups) == 1:
        return groups[0]
    # Targets are names of modules, which may begin otherwise than the names of stored tensors.
    return max(groups, key=lambda group: max(_same_end(linear, target) for target in group["targets"]))


def _same_end(name: str, other: str) -> int:
    """How many parts two dotted names share at their ends."""
    pairs = zip(reversed(name.split(".")), reversed(other.split(".")), strict=False)
    return next(
        (count for count, (one, two) in enumerate(pairs) if one != two), min(name.count("."), other.count(".")) + 1
    )


def dense_weights(
    names: Iterable[str], read: Callable[[str], torch.Tensor], settings: Mapping[str, Any], exact: bool = False
) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint; quantized linears become ``weight`` ``[out, in]``.

    Weights are computed in the dtype of their scales, as loaders of GPTQ and AWQ do it; in float32 if ``exact``, or if
    scales are floats of eight bits. ``names`` lists the stored tensors, ``read`` loads one of them; ``settings`` is the
    ``quantization_config`` of ``config.json``.

    Raises:
        CalibrantError: the layout or bit width is not supported, or a linear's tensors are missing or do not fit.
    """
    names = list(names)
    linears = quantized_linears(names, settings)
    parts = {name for stored in linears.values() for name in stored} | cache_scales(names, settings)
    dense = {name: read(name) for name in sorted(names) if name not in parts}
    for linear, stored in linears.items():
        dense[f"{linear}.weight"] = dequantized(
            stored_codes(linear, stored, read, settings), stored_type(linear, settings), exact
        )
    return dense


def stored_type(linear: str, settings: Mapping[str, Any]) -> WeightType:
    """The type of the weights of ``linear``."""
    kind = stored_format(settings)
    if kind in ("gptq", "awq"):
        return "int"
    return "fp8" if kind == "fp8" else stored_layout(linear, settings).type


def dense_shape(
    linear: str, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor], settings: Mapping[str, Any]
) -> tuple[int, int]:
    """``(out, in)`` of ``linear``, from the ``shapes`` of stored tensors; ``read`` loads small ones."""
    kind = stored_format(settings)
    rows, columns = shapes[f"{linear}.{'weight' if _MARKS[kind].startswith('weight_scale') else _MARKS[kind]}"]
    if kind == "pack-quantized":
        rows, columns = read(f"{linear}.weight_shape").tolist()
    elif kind == "gptq":
        rows, columns = columns, rows * 32 // int(settings.get("bits", 4))
    elif kind == "awq":
        rows, columns = columns * 32 // int(settings.get("bits", 4)), rows
    elif kind == GgufBlocks.name:
        known = GGUF_TYPES[settings["types"][linear]]
        columns = columns // known.block_bytes * known.block
    elif kind in ("mxfp4-pack-quantized", "nvfp4-pack-quantized"):
        columns = 2 * columns
    return rows, columns


def dequantized(codes: Codes, kind: WeightType, exact: bool = False) -> torch.Tensor:
    """The weights ``[out, in]`` of ``codes`` of a type; dtype as above, of llama.cpp's types float32."""
    if kind in GGUF_TYPES:
        return _of_blocks(codes)
    scale = codes.scale.float() if exact or codes.scale.itemsize == 1 else codes.scale
    scale = scale if codes.global_scale is None else scale / codes.global_scale
    rows, columns = codes.codes.shape
    if scale.numel() == 1:
        scale = scale.expand(rows, columns)
    elif scale.shape[0] != rows:  # blocks, of which the last may be cut off
        scale = scale.repeat_interleave(BLOCK_SIZE, dim=0).repeat_interleave(BLOCK_SIZE, dim=1)[:rows, :columns]
    else:
        scale = scale.repeat_interleave(columns // scale.shape[1], dim=1)
    if kind in FLOAT_TYPES:
        return (decoded_floats(codes.codes).to(scale.dtype) * scale).contiguous()
    zero_point = codes.zero_point.repeat_interleave(columns // codes.zero_point.shape[1], dim=1)
    # The difference of two int8 values can need nine bits.
    return ((codes.codes.to(scale.dtype) - zero_point.to(scale.dtype)) * scale).contiguous()


def _of_blocks(codes: Codes) -> torch.Tensor:
    """Weights (float32) of llama.cpp's types."""
    columns = codes.codes.shape[1]

    def of_columns(values: torch.Tensor, integers: torch.Tensor | None) -> torch.Tensor:
        found = values.float().repeat_interleave(columns // values.shape[1], dim=1)
        if integers is None:
            return found
        return found * integers.float().repeat_interleave(columns // integers.shape[1], dim=1)

    values = of_columns(codes.scale, codes.sub_scale) * codes.codes.float()
    return values if codes.minimum is None else values - of_columns(codes.minimum, codes.sub_minimum)


def stored_format(settings: Mapping[str, Any]) -> str:
    """The name of the format.

    Raises:
        CalibrantError: it is not one of ours.
    """
    kind = settings.get("quant_method")
    kind = str(settings.get("format") if kind in ("compressed-tensors", "calibrant") else kind)
    if kind not in _MARKS:
        raise CalibrantError(f"config.json: weights quantized as {kind}, which is not read here")
    return kind
