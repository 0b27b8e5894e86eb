"""Static int8 ranges of a layer's input: observing values, then choosing the range to cover.

One asymmetric range per tensor, fixed before inference, as in Quadapter (arXiv 2211.16912) and ZSAQ (arXiv 2310.13315).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from calibrant.kernels.number_types import E2M1, E4M3, NumberType
from calibrant.quantization.grids import GridSpec, parameters

# Bits of quantized activations.
ACTIVATION_BITS = 8

RangeRule = Literal["minmax", "percentile", "mse"]
_BINS = 4096
_SHRINK_STEPS = 100


@dataclass(frozen=True)
class InputGrid:
    """``scale`` in storage dtype and ``zero_point`` int8, both ``[1]``: ``x = scale (number - zero_point)``.

    Floats have no zero point; of nvfp4 inputs, ``scale`` is the one that divides the scales of their groups.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None


class InputRange:
    """Minimum, maximum and a histogram of a layer's input over counted tokens; ``finite`` if every value was."""

    def __init__(self, device: torch.device) -> None:
        self.low, self.high, self.finite = 0.0, 0.0, True
        self._bound = 0.0
        self._counts = torch.zeros(_BINS, dtype=torch.float64, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """Observe further inputs ``[tokens, in]``."""
        low, high = (float(value) for value in torch.aminmax(inputs))
        self.finite = self.finite and math.isfinite(low) and math.isfinite(high)
        largest = max(-low, high)
        if not self.finite or largest == 0:
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self._bound == 0:
            self._bound = 2.0 ** torch.tensor(largest).log2().ceil().item()
        while self._bound < largest:
            self._widen()
        self._counts += torch.histc(inputs.float(), _BINS, -self._bound, self._bound)

    def merge(self, other: "InputRange") -> None:
        """Add what another range has observed."""
        self.finite = self.finite and other.finite
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        if other._bound == 0:
            return
        self._bound = self._bound or other._bound
        while self._bound < other._bound:
            self._widen()
        wide = InputRange(self._counts.device)
        wide._bound, wide._counts = other._bound, other._counts.clone()
        while wide._bound < self._bound:
            wide._widen()
        self._counts += wide._counts

    def _widen(self) -> None:
        """Double the bound by merging pairs of bins, which is exact."""
        merged = self._counts.view(-1, 2).sum(1)
        self._counts.zero_()
        self._counts[_BINS // 4 : 3 * _BINS // 4] = merged
        self._bound *= 2

    def grid(self, rule: RangeRule, percentile: float, scale_dtype: torch.dtype) -> InputGrid:
        """The int8 grid of the range that ``rule`` chooses; the range always includes 0.

        "minmax" covers every observed value. "percentile" clips ``100 - percentile`` percent of the values, half at
        each end. "mse" scales minimum and maximum by the share with the smallest squared error of rounding and clipping
        (ours: shares 1, 0.99, ... 0.01, errors from the histogram).
        """
        spec = GridSpec(ACTIVATION_BITS, False, None, scale_dtype)
        low, high = torch.tensor([self.low]), torch.tensor([self.high])
        if rule == "percentile" and self._bound:
            cut = (1 - percentile / 100) / 2
            low = torch.maximum(low, self._quantile(cut)).clamp(max=0)
            high = torch.minimum(high, self._quantile(1 - cut)).clamp(min=0)
        scale, zero_point = parameters(low, high, spec)
        if rule == "mse" and self._bound:
            shares = 1 - torch.arange(_SHRINK_STEPS) / _SHRINK_STEPS
            scales, zero_points = parameters(low * shares, high * shares, spec)
            best = self._error(scales, zero_points, spec).argmin()
            scale, zero_point = scales[best, None], zero_points[best, None]
        return InputGrid(scale.to(scale_dtype), zero_point.to(torch.int8))

    def symmetric_scale(self, numbers: NumberType, scale_dtype: torch.dtype) -> InputGrid:
        """The grid of ``numbers`` whose largest is the largest magnitude observed."""
        largest = torch.tensor([max(-self.low, self.high)])
        return InputGrid(torch.where(largest > 0, largest / numbers.qmax, 1.0).to(scale_dtype), None)

    def global_scale(self) -> InputGrid:
        """The scale (float32) that takes the largest magnitude observed to the largest E2M1 times the largest E4M3."""
        largest = torch.tensor([max(-self.low, self.high)])
        return InputGrid(torch.where(largest > 0, E2M1.qmax * E4M3.qmax / largest, 1.0), None)

    def _centers(self) -> torch.Tensor:
        return ((torch.arange(_BINS) + 0.5) / _BINS * 2 - 1) * self._bound

    def _quantile(self, share: float) -> torch.Tensor:
        cumulative = self._counts.cumsum(0).cpu()
        return self._centers()[torch.searchsorted(cumulative, share * cumulative[-1]).clamp(max=_BINS - 1)][None]

    def _error(self, scales: torch.Tensor, zero_points: torch.Tensor, spec: GridSpec) -> torch.Tensor:
        centers, scale, zero_point = self._centers(), scales[:, None], zero_points[:, None]
        codes = torch.round(torch.clamp(centers / scale + zero_point, spec.qmin, spec.qmax))
        return (((codes - zero_point) * scale - centers).double().square() * self._counts.cpu()).sum(1)
