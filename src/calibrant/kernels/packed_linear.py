"""Linears that pack their weight once, for many products with few rows, in bfloat16 and in float32.

Matrix libraries pack the weight at every call, which for a few dozen rows takes as long as the product.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import nn

from calibrant.kernels.bfloat16_tile import COLUMNS, ROWS, multiply_tile, pack_columns
from calibrant.kernels.bfloat16_words import pairs, rounded, widened, words
from calibrant.kernels.float32_products import add_linear, panels_of_rows


class PackedFloat32Linear(nn.Module):
    """``y = x W^T + b`` for float32 ``x`` ``[..., in]`` on the CPU; needs ``float32_tile.available()``.

    A row's result does not depend on the other rows.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._panels = panels_of_rows(linear.weight.detach())
        self._bias = linear.bias.detach().clone() if linear.bias is not None else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, self.in_features)
        output = rows.new_zeros(len(rows), self.out_features)
        if self._bias is not None:
            output += self._bias
        add_linear(output, rows, self._panels)
        return output.view(*inputs.shape[:-1], self.out_features)

    def unpacked(self) -> nn.Linear:
        """The linear that was packed."""
        return _linear(torch.from_numpy(self._panels), self.out_features, self._bias)


class PackedLinear(nn.Module):
    """``y = x W^T + b`` for bfloat16 ``x`` ``[..., in]`` on the CPU; needs ``bfloat16_tile.available()`` and an even
    ``in``.

    A row's result does not depend on the other rows.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        panels = np.empty((-(-self.out_features // COLUMNS), self.in_features // 2, COLUMNS), dtype=np.uint32)
        _pack(pairs(linear.weight.detach()), panels)
        self._panels = panels
        self._bias = linear.bias.detach().clone() if linear.bias is not None else None
        zeros = torch.zeros(self.out_features, dtype=torch.bfloat16)
        self._added = words(self._bias if self._bias is not None else zeros)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, self.in_features)
        packed = np.empty((-(-len(rows) // COLUMNS), self.in_features // 2, COLUMNS), dtype=np.uint32)
        _pack(pairs(rows), packed)
        output = torch.empty(len(rows), self.out_features, dtype=torch.bfloat16)
        _multiply(packed, self._panels, self._added, words(output))
        return output.view(*inputs.shape[:-1], self.out_features)

    def unpacked(self) -> nn.Linear:
        """The linear that was packed."""
        panels, pair_count, columns = self._panels.shape
        numbers = torch.from_numpy(self._panels.view(np.uint16)).view(torch.bfloat16)
        steps = numbers.view(panels, pair_count, columns, 2).transpose(2, 3).reshape(panels, -1, columns)
        return _linear(steps, self.out_features, self._bias)


def _linear(panels: torch.Tensor, out_features: int, bias: torch.Tensor | None) -> nn.Linear:
    """A linear of panels ``[panels, in, COLUMNS]`` and a bias."""
    weight = panels.transpose(1, 2).reshape(-1, panels.shape[1])[:out_features].contiguous()
    linear = nn.Linear(weight.shape[1], out_features, bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


@numba.njit(error_model="numpy", cache=True)
def _pack(source: np.ndarray, panels: np.ndarray) -> None:
    """Pack rows into panels with pairs along the width; on one thread, since a few dozen rows are packed sooner than
    threads start.
    """
    for panel in range(panels.shape[0]):
        pack_columns(source, panel * COLUMNS, panels[panel])


def _multiply_panels(packed: np.ndarray, panels: np.ndarray, bias: np.ndarray, output: np.ndarray) -> None:
    """Multiply by panel of outputs in parallel; ``packed`` contains the inputs' rows."""
    rows, width = output.shape
    pair_count = panels.shape[1]
    for panel in numba.prange(panels.shape[0]):
        sums = np.empty((ROWS, COLUMNS), dtype=np.float32)
        right = np.intp(panels[panel].ctypes.data)
        first = panel * COLUMNS
        for begin in range(0, rows, ROWS):
            sums[:] = 0
            left = np.intp(packed[begin // COLUMNS].ctypes.data) + 4 * (begin % COLUMNS)
            multiply_tile(left, right, pair_count, np.intp(sums.ctypes.data), COLUMNS)
            for row in range(min(ROWS, rows - begin)):
                target = output[begin + row]
                for column in range(min(COLUMNS, width - first)):
                    value = sums[row, column] + widened(bias[first + column])
                    target[first + column] = np.uint16(rounded(value) >> np.uint32(16))


_multiply: Callable[..., None] = numba.njit(parallel=True, error_model="numpy", cache=True)(_multiply_panels)
