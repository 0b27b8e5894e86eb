"""Quantized inputs at run time: hooks that round a linear's input to the values its codes stand for."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

from calibrant.errors import CalibrantError
from calibrant.formats.gguf_types import SUPER_BLOCK
from calibrant.formats.input_rounding import BITS, INPUT_ROUNDING, QMAX, QMIN, InputGrids
from calibrant.formats.stored_codes import quantized_linears, settings_of
from calibrant.kernels.number_types import E4M3
from calibrant.modeling.attention_caches import round_caches
from calibrant.modeling.checkpoint import ModelFolder
from calibrant.modeling.tensor_sources import loaded_names
from calibrant.quantization.grid_fitting import rounded
from calibrant.quantization.grids import MX_SCALE, NV_SCALE, GridSpec
from calibrant.quantization.token_scales import token_scales

Hook = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]
_INPUT_TENSORS = ("input_scale", "input_zero_point", "input_global_scale")
_BYTE = 8
_LLAMA_CPP_BLOCK = 32


def apply_input_rounding(model: nn.Module, grids: InputGrids) -> None:
    """Round the inputs of the linears named in ``grids`` in every later forward pass of ``model``.

    Raises:
        CalibrantError: the model lacks one of the linears.
    """
    modules = dict(model.named_modules())
    for name, grid in grids.items():
        if name not in modules:
            raise CalibrantError(f"{INPUT_ROUNDING}: {name} is no layer of this model; compress the model again")
        modules[name].register_forward_pre_hook(_rounding_hook(grid))


def round_inputs(model: transformers.PreTrainedModel, folder: ModelFolder, largest_byte: float | None = None) -> None:
    """Round inputs in every later forward pass of ``model`` as the checkpoint in ``folder`` says.

    Keys and values too, if it says so. Only checkpoints of compressed-tensors have such inputs. A
    token's largest int8 input is at ``largest_byte`` (None: as in compressed-tensors).
    """
    settings = folder.quantization
    if settings is None or settings.get("quant_method") != "compressed-tensors":
        return
    round_caches(model, folder)
    linears = quantized_linears(folder.tensors, settings)
    modules = loaded_names(model, [f"{linear}.weight" for linear in linears])
    for linear in linears:
        inputs = settings_of(linear, settings).get("input_activations")
        if inputs is not None:
            stored = [part for part in _INPUT_TENSORS if f"{linear}.{part}" in folder.tensors]
            scales = {part: folder.read(f"{linear}.{part}") for part in stored}
            module = model.get_submodule(modules[f"{linear}.weight"].removesuffix(".weight"))
            module.register_forward_pre_hook(_hook(inputs, scales, largest_byte))


def _hook(inputs: Mapping[str, Any], scales: Mapping[str, torch.Tensor], largest_byte: float | None) -> Hook:
    """The hook for ``input_activations`` of a checkpoint; ``scales`` are the stored ones."""
    if inputs["type"] == "int":
        if inputs["dynamic"] and largest_byte is not None:
            return _hook_of(lambda values: _bytes(values, largest_byte))
        if inputs["dynamic"]:
            return _rounding_hook(None)
        return _rounding_hook((float(scales["input_scale"]), int(scales["input_zero_point"])))
    if inputs["strategy"] == "tensor":
        scale = scales["input_scale"].float()
        return _hook_of(lambda values: E4M3.nearest(values / scale.to(values.device)) * scale.to(values.device))
    scale_dtype = torch.float32 if inputs["num_bits"] == _BYTE else MX_SCALE
    spec = GridSpec(inputs["num_bits"], True, inputs.get("group_size"), scale_dtype, floating=True)
    if "input_global_scale" in scales:
        spec = replace(spec, scale_dtype=NV_SCALE, global_scale=float(scales["input_global_scale"]))
    return _hook_of(lambda values: rounded(values, spec))


def round_to_bytes(linear: nn.Module, super_blocks: bool = False) -> None:
    """Round the inputs of ``linear`` as llama.cpp does before it multiplies by codes: to int8, in blocks of 32 with
    float16 scales, or for types with ``super_blocks`` of 256 with float32 scales (ggml, ``quantize_row_q8_0`` and
    ``quantize_row_q8_K``)."""
    size, scale_dtype = (SUPER_BLOCK, torch.float32) if super_blocks else (_LLAMA_CPP_BLOCK, torch.float16)

    def rounding(values: torch.Tensor) -> torch.Tensor:
        return _bytes(values.unflatten(-1, (-1, size)), float(QMAX), scale_dtype).flatten(-2)

    linear.register_forward_pre_hook(_hook_of(rounding))


def round_to_dtype(linear: nn.Module, dtype: torch.dtype) -> None:
    """Round the inputs of ``linear`` to ``dtype``, as llama.cpp does before it multiplies by weights of that dtype."""
    linear.register_forward_pre_hook(_hook_of(lambda values: values.to(dtype).float()))


def _bytes(values: torch.Tensor, largest_byte: float, scale_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``values`` ``[.., n]`` as int8 numbers times one scale for each row, whose largest number is ``largest_byte``."""
    largest = values.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / largest_byte, 1.0)
    return (values / scale).round().clamp(QMIN, QMAX) * scale.to(scale_dtype).float()


def _hook_of(rounding: Callable[[torch.Tensor], torch.Tensor]) -> Hook:
    def round_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return rounding(args[0].float()).to(args[0].dtype), *args[1:]

    return round_input


def _rounding_hook(grid: tuple[float, int] | None) -> Hook:
    def round_values(inputs: torch.Tensor) -> torch.Tensor:
        if grid is None:
            scale, zero_point = token_scales(inputs, BITS), 0
        else:
            scale, zero_point = torch.tensor(grid[0], device=inputs.device), grid[1]
        codes = (inputs / scale + zero_point).clamp(QMIN, QMAX).round()
        return (codes - zero_point) * scale

    return _hook_of(round_values)
