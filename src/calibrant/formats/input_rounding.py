"""Int8 inputs of linears that no quantized format holds: which they are and on what grids, beside dense weights.

The file is our own: loaders of others read the rounded weights, and compute with inputs that are not rounded.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibrant.errors import CalibrantError
from calibrant.hashing import canonical_json

INPUT_ROUNDING = "input_rounding.json"
# Scale and zero point of one asymmetric grid a tensor; None for a symmetric one of each token's own.
InputGrids = Mapping[str, tuple[float, int] | None]
_BITS, _QMIN, _QMAX = 8, -128, 127


def write_input_rounding(folder: Path, grids: InputGrids) -> None:
    """Write the grids of linears by module name."""
    linears = {
        name: {"dynamic": True} if grid is None else {"scale": grid[0], "zero_point": grid[1]}
        for name, grid in grids.items()
    }
    (folder / INPUT_ROUNDING).write_text(canonical_json({"bits": _BITS, "linears": linears}), encoding="utf-8")


def read_input_rounding(folder: Path) -> dict[str, tuple[float, int] | None]:
    """Inverse of ``write_input_rounding``; of a folder without such a file nothing.

    Raises:
        CalibrantError: the file is damaged.
    """
    file = folder / INPUT_ROUNDING
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["bits"] != _BITS:
            raise ValueError(f"bits are {content['bits']}, known are {_BITS}")
        return {name: _read_grid(name, grid) for name, grid in content["linears"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalibrantError(f"{file}: damaged ({error}); compress the model again") from error


def _read_grid(name: str, grid: dict[str, Any]) -> tuple[float, int] | None:
    if grid == {"dynamic": True}:
        return None
    scale, zero_point = grid["scale"], grid["zero_point"]
    if not (0 < scale < math.inf and zero_point in range(_QMIN, _QMAX + 1)):
        raise ValueError(f"{name} has scale {scale} and zero point {zero_point}")
    return float(scale), int(zero_point)


def apply_input_rounding(model: nn.Module, grids: InputGrids) -> None:
    """From now on those linears in ``model`` read what their int8 inputs stand for.

    Raises:
        CalibrantError: the model has no such linear.
    """
    modules = dict(model.named_modules())
    for name, grid in grids.items():
        if name not in modules:
            raise CalibrantError(f"{INPUT_ROUNDING}: {name} is no layer of this model; compress the model again")
        modules[name].register_forward_pre_hook(_hook(grid))


def token_scales(inputs: torch.Tensor, bits: int) -> torch.Tensor:
    """Scales ``[.., 1]`` of the symmetric grids of each token's own, of inputs ``[.., in]``."""
    largest = inputs.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, largest / ((2**bits - 1) / 2), 1.0)


def _hook(grid: tuple[float, int] | None) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def rounded(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs = args[0].float()
        if grid is None:
            scale, zero_point = token_scales(inputs, _BITS), 0
        else:
            scale, zero_point = torch.tensor(grid[0], device=inputs.device), grid[1]
        codes = (inputs / scale + zero_point).clamp(_QMIN, _QMAX).round()
        return ((codes - zero_point) * scale).to(args[0].dtype), *args[1:]

    return rounded
