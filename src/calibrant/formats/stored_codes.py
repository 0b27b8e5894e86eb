"""The codes of a finished quantized checkpoint, whatever its format."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from calibrant.errors import CalibrantError
from calibrant.formats.compressed_tensors import IntQuantized, PackQuantized
from calibrant.formats.dense import read_codes
from calibrant.formats.quantized import Codes, Layout

# Of each format, the tensor that only quantized linears have.
_MARKS = {"gptq": "qweight", "awq": "qweight", "pack-quantized": "weight_packed", "int-quantized": "weight_scale"}


def quantized_linears(names: Iterable[str], settings: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """The stored tensors of every quantized linear by the linear's name.

    ``names`` lists the stored tensors; ``settings`` is the ``quantization_config`` of ``config.json``, None without.
    """
    if settings is None:
        return {}
    mark, known = _MARKS[_format(settings)], set(names)
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
    kind = _format(settings)
    if kind in ("gptq", "awq"):
        return read_codes(linear, parts, dict(settings))
    weights = _group_of(linear, settings)["weights"]
    layout = Layout(int(weights["num_bits"]), bool(weights["symmetric"]), weights.get("group_size"))
    return (IntQuantized() if kind == "int-quantized" else PackQuantized()).read(parts, layout)


def _format(settings: Mapping[str, Any]) -> str:
    kind = settings.get("quant_method")
    kind = str(settings.get("format") if kind == "compressed-tensors" else kind)
    if kind not in _MARKS:
        raise CalibrantError(f"config.json: weights quantized as {kind}, which is not read here")
    return kind


def _group_of(linear: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    groups: list[Mapping[str, Any]] = list(settings["config_groups"].values())
    return next((group for group in groups if linear in group["targets"]), groups[0])
