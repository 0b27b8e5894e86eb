"""Grids of int8 inputs stored beside dense weights, for linears that no quantized format supports.

The file is our own format. Other loaders read the rounded weights and leave the inputs unrounded.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibrant.errors import CalibrantError
from calibrant.hashing import canonical_json

INPUT_ROUNDING = "input_rounding.json"
BITS, QMIN, QMAX = 8, -128, 127
# By module name: scale and zero point of an asymmetric grid for the whole tensor; None for a symmetric grid per token.
InputGrids = Mapping[str, tuple[float, int] | None]


def write_input_rounding(folder: Path, grids: InputGrids) -> None:
    """Write ``grids`` to ``input_rounding.json`` in ``folder``."""
    linears = {
        name: {"dynamic": True} if grid is None else {"scale": grid[0], "zero_point": grid[1]}
        for name, grid in grids.items()
    }
    (folder / INPUT_ROUNDING).write_text(canonical_json({"bits": BITS, "linears": linears}), encoding="utf-8")


def read_input_rounding(folder: Path) -> dict[str, tuple[float, int] | None]:
    """Inverse of ``write_input_rounding``; empty if the folder has no such file.

    Raises:
        CalibrantError: the file is damaged.
    """
    file = folder / INPUT_ROUNDING
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["bits"] != BITS:
            raise ValueError(f"bits are {content['bits']}, known are {BITS}")
        return {name: _read_grid(name, grid) for name, grid in content["linears"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CalibrantError(f"{file}: damaged ({error}); compress the model again") from error


def _read_grid(name: str, grid: dict[str, Any]) -> tuple[float, int] | None:
    if grid == {"dynamic": True}:
        return None
    scale, zero_point = grid["scale"], grid["zero_point"]
    if not (0 < scale < math.inf and zero_point in range(QMIN, QMAX + 1)):
        raise ValueError(f"{name} has scale {scale} and zero point {zero_point}")
    return float(scale), int(zero_point)
