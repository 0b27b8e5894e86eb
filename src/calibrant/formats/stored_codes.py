"""The codes of a finished quantized checkpoint, whatever its format, and the weights they stand for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import regex
import torch

from calibrant.errors import CalibrantError
from calibrant.formats.compressed_tensors import IntQuantized, PackQuantized
from calibrant.formats.float_quantized import FloatQuantized, MxFp4Packed, NvFp4Packed
from calibrant.formats.gguf_blocks import GgufBlocks
from calibrant.formats.gguf_types import GGUF_TYPES
from calibrant.formats.gptq_and_awq import read_codes
from calibrant.formats.kv_cache import cache_scales
from calibrant.formats.quantized import BLOCK_SIZE, FLOAT_TYPES, STORED_WIDTHS, Codes, Layout, WeightFormat, WeightType
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
# How compressed-tensors calls a scale a channel, and one a group.
_MATCHING_SECONDS = 1.0
_STRATEGIES = ("channel", "group", "tensor_group")


def quantized_linears(names: Iterable[str], settings: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """The stored tensors of every quantized linear by the linear's name.

    ``names`` lists the stored tensors; ``settings`` is the ``quantization_config`` of ``config.json``, None without.
    """
    if settings is None:
        return {}
    mark, known = _MARKS[stored_format(settings)], set(names)
    linears = {name.removesuffix(f".{mark}") for name in known if name.endswith(f".{mark}")}
    found: dict[str, list[str]] = {linear: [] for linear in sorted(linears)}
    for name in sorted(known):
        linear, _, suffix = name.rpartition(".")
        if linear in found and suffix != "bias":
            found[linear].append(name)
    return found


def decoded_weight(
    linear: str,
    tensors: Iterable[str],
    read: Callable[[str], torch.Tensor],
    settings: Mapping[str, Any],
    exact: bool = False,
) -> torch.Tensor:
    """The weight ``[out, in]`` that the stored ``tensors`` of ``linear`` stand for; dtype as in ``dense_weights``.

    Raises:
        CalibrantError: as ``stored_codes``.
    """
    return dequantized(stored_codes(linear, tensors, read, settings), stored_layout(linear, settings), exact)


def stored_codes(
    linear: str, tensors: Iterable[str], read: Callable[[str], torch.Tensor], settings: Mapping[str, Any]
) -> Codes:
    """The codes of ``linear``, whose stored ``tensors`` ``read`` loads.

    Raises:
        CalibrantError: the format is not one of ours, or a tensor is missing or does not fit.
    """
    parts = {name.rpartition(".")[2]: read(name) for name in tensors}
    kind, layout = stored_format(settings), stored_layout(linear, settings)
    if kind in ("gptq", "awq"):
        return read_codes(linear, parts, dict(settings))
    if "weight_g_idx" in parts:
        raise CalibrantError(f"{linear}: its groups are out of order (actorder), which is not read here")
    try:
        if kind == "fp8":
            parts["weight_scale"] = parts["weight_scale_inv"].float()
        codes = _FORMATS["float-quantized" if kind == "fp8" else kind].read(parts, layout)
        fits = codes.scale.shape == _scale_shape(codes.codes.shape, layout)
    except (KeyError, RuntimeError, IndexError, ValueError, TypeError) as error:
        raise CalibrantError(
            f"{linear}: its tensors are not what config.json describes ({error!r}); copy or download the model again"
        ) from error
    if not fits:
        raise CalibrantError(
            f"{linear}: scales of shape {tuple(codes.scale.shape)} do not fit its weight of shape "
            f"{tuple(codes.codes.shape)} and config.json; copy or download the model again"
        )
    return codes


def _scale_shape(shape: torch.Size, layout: Layout) -> tuple[int, int]:
    """The shape of the scales of a weight of ``shape``."""
    rows, columns = shape
    if layout.type in GGUF_TYPES:
        return rows, columns // GGUF_TYPES[layout.type].block
    if layout.granularity == "block":
        return -(-rows // BLOCK_SIZE), -(-columns // BLOCK_SIZE)
    return (1, 1) if layout.granularity == "tensor" else (rows, columns // (layout.group_size or columns))


def stored_layout(linear: str, settings: Mapping[str, Any]) -> Layout:
    """The layout of ``linear``.

    Raises:
        CalibrantError: the settings lack something, or describe what is not read here.
    """
    kind = stored_format(settings)
    try:
        if kind in ("gptq", "awq"):
            return Layout(int(settings.get("bits", 4)), False, None, format="gptq" if kind == "gptq" else "awq")
        if kind == "fp8":
            return _fp8_layout(settings)
        if kind == GgufBlocks.name:
            known = GGUF_TYPES[settings["types"][linear]]
            return Layout(known.bits, not known.minima, known.group_size, format="gguf", type=known.name)
        return _layout(kind, settings_of(linear, settings)["weights"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CalibrantError(
            f"config.json: quantization_config does not describe {linear} ({error!r}); copy or download it again"
        ) from error


def _fp8_layout(settings: Mapping[str, Any]) -> Layout:
    """Of models as DeepSeek publishes them."""
    if list(settings.get("weight_block_size") or []) != [BLOCK_SIZE] * 2 or settings.get("fmt", "e4m3") != "e4m3":
        raise CalibrantError(
            f"config.json: FP8 weights are read as e4m3 in blocks of {BLOCK_SIZE} x {BLOCK_SIZE} alone, not as "
            f"{settings.get('fmt', 'e4m3')} in {settings.get('weight_block_size')}"
        )
    return Layout(8, True, None, type="fp8", granularity="block")


def _layout(kind: str, weights: Mapping[str, Any]) -> Layout:
    """Of the ``weights`` of a group of compressed-tensors."""
    bits, strategy, symmetric = weights["num_bits"], weights["strategy"], weights["symmetric"]
    of_type = _TYPES.get(kind, "int")
    blocks = weights.get("block_structure") if strategy == "block" else None
    known: Sequence[int] = STORED_WIDTHS
    if kind == IntQuantized.name:  # bytes, of which fewer bits may be used
        known = range(2, 9)
    elif of_type != "int":
        known = (8,) if of_type == "fp8" else (4,)
    coarse = of_type == "fp8" and (strategy == "tensor" or (strategy == "block" and blocks == [BLOCK_SIZE] * 2))
    if bits not in known or type(symmetric) is not bool or not (coarse or strategy in _STRATEGIES):
        raise CalibrantError(
            f"config.json: weights of {bits} bits in the format {kind}, strategy {strategy}"
            f"{f' of {blocks}' if blocks else ''}, are not read here"
        )
    group_size = None if coarse or strategy == "channel" else int(weights["group_size"])
    return Layout(bits, symmetric, group_size, type=of_type, granularity=strategy if coarse else "channel")


def settings_of(linear: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group of a compressed-tensors configuration that ``linear`` is in: by its name, by an expression, by class.

    Raises:
        CalibrantError: none of several is for it, or the targets do not say which.
    """
    groups: list[Mapping[str, Any]] = list(settings["config_groups"].values())
    if len(groups) == 1:
        return groups[0]
    alike = [max((_same_end(linear, target) for target in group["targets"]), default=0) for group in groups]
    if max(alike) > 0:
        return groups[alike.index(max(alike))]
    for fits in (_is_matched, lambda _, target: target == "Linear"):
        found = [group for group in groups if any(fits(linear, target) for target in group["targets"])]
        if found:
            return found[0]
    raise CalibrantError(f"config.json: none of its {len(groups)} config_groups is for {linear}")


def _is_matched(name: str, target: str) -> bool:
    """Whether ``target`` is an expression that ``name`` begins with."""
    if not target.startswith("re:"):
        return False
    try:
        return regex.match(target.removeprefix("re:"), name, timeout=_MATCHING_SECONDS) is not None
    except (regex.error, OverflowError, RecursionError, TimeoutError) as error:
        raise CalibrantError(f"config.json: the target {target!r} of config_groups cannot be matched") from error


def _same_end(name: str, other: str) -> int:
    """How many parts two dotted names of one module share at their ends; 0 if they name different modules.

    Names of modules may begin otherwise than the names of stored tensors, but are equal from the block's number on.
    """
    if _tail(name) != _tail(other):
        return 0
    pairs = list(zip(reversed(name.split(".")), reversed(other.split(".")), strict=False))
    return next((count for count, (one, two) in enumerate(pairs) if one != two), len(pairs))


def _tail(name: str) -> list[str]:
    parts = name.split(".")
    return parts[next((index for index, part in enumerate(parts) if part.isdigit()), -1) :]


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
        dense[f"{linear}.weight"] = decoded_weight(linear, stored, read, settings, exact)
    return dense


def dense_shape(
    linear: str, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor], settings: Mapping[str, Any]
) -> tuple[int, int]:
    """``(out, in)`` of ``linear``, from the ``shapes`` of stored tensors; ``read`` loads small ones.

    Raises:
        CalibrantError: a tensor is missing, or the settings are damaged.
    """
    kind, layout = stored_format(settings), stored_layout(linear, settings)
    try:
        rows, columns = shapes[f"{linear}.{'weight' if _MARKS[kind].startswith('weight_scale') else _MARKS[kind]}"]
        if kind == "pack-quantized":
            rows, columns = read(f"{linear}.weight_shape").tolist()
    except (KeyError, ValueError, OverflowError) as error:
        raise CalibrantError(
            f"{linear}: its tensors are not what config.json describes ({error!r}); copy or download the model again"
        ) from error
    if kind == "gptq":
        rows, columns = columns, rows * 32 // layout.bits
    elif kind == "awq":
        rows, columns = columns * 32 // layout.bits, rows
    elif layout.type in GGUF_TYPES:
        known = GGUF_TYPES[layout.type]
        columns = columns // known.block_bytes * known.block
    elif kind in ("mxfp4-pack-quantized", "nvfp4-pack-quantized"):
        columns = 2 * columns
    return rows, columns


def dequantized(codes: Codes, layout: Layout, exact: bool = False) -> torch.Tensor:
    """The weights ``[out, in]`` of ``codes``; dtype as in ``dense_weights``, of llama.cpp's types float32."""
    if layout.type in GGUF_TYPES:
        return _of_blocks(codes)
    scale = codes.scale.float() if exact or codes.scale.itemsize == 1 else codes.scale
    scale = scale if codes.global_scale is None else scale / codes.global_scale
    rows, columns = codes.codes.shape
    if layout.granularity == "tensor":
        scale = scale.expand(rows, columns)
    elif layout.granularity == "block":  # of which the last may be cut off
        scale = scale.repeat_interleave(BLOCK_SIZE, dim=0).repeat_interleave(BLOCK_SIZE, dim=1)[:rows, :columns]
    else:
        scale = scale.repeat_interleave(columns // scale.shape[1], dim=1)
    if layout.type in FLOAT_TYPES:
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
