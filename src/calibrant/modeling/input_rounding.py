"""Quantized inputs at run time: hooks that round a linear's input to the values its codes stand for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from calibrant.errors import CalibrantError
from calibrant.formats.input_rounding import BITS, INPUT_ROUNDING, QMAX, QMIN, InputGrids
from calibrant.quantization.grid_fitting import rounded
from calibrant.quantization.grids import MX_SCALE, NV_SCALE, GridSpec
from calibrant.quantization.token_scales import token_scales


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


def round_float_inputs(linear: nn.Module, group_size: int, global_scale: float | None) -> None:
    """Round the inputs of ``linear`` to four-bit floats in every later forward pass.

    With ``global_scale`` as in NVFP4, without as in MXFP4.
    """
    scales = MX_SCALE if global_scale is None else NV_SCALE
    spec = GridSpec(4, True, group_size, scales, floating=True, global_scale=global_scale)

    def round_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return rounded(args[0].float(), spec).to(args[0].dtype), *args[1:]

    linear.register_forward_pre_hook(round_input)


def _rounding_hook(grid: tuple[float, int] | None) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def round_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs = args[0].float()
        if grid is None:
            scale, zero_point = token_scales(inputs, BITS), 0
        else:
            scale, zero_point = torch.tensor(grid[0], device=inputs.device), grid[1]
        codes = (inputs / scale + zero_point).clamp(QMIN, QMAX).round()
        return ((codes - zero_point) * scale).to(args[0].dtype), *args[1:]

    return round_input
