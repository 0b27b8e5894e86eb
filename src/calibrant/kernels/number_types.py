"""The numbers that codes stand for: integers, or floating-point numbers of four or eight bits.

All are multiples of a step, a power of two that grows with the number's exponent; for integers it is always 1. So one
rounding, to the nearest multiple and half to even, serves all; Numba and PyTorch give the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
import torch

# What compiled kernels take: range, mantissa bits, least exponent with its bias.
CompiledNumbers = tuple[np.float32, np.float32, np.int32, np.int32]
_MANTISSA_BITS = 23
_EXPONENT_BIAS = 127


@dataclass(frozen=True)
class NumberType:
    """Numbers from ``qmin`` to ``qmax``: multiples of ``2 ** (max(e, least_exponent) - mantissa_bits)``, where e is the
    number's exponent."""

    qmin: float
    qmax: float
    mantissa_bits: int
    least_exponent: int

    @classmethod
    def integers(cls, bits: int) -> "NumberType":
        """Signed integers of ``bits`` bits, at most 8."""
        return cls(-(1 << (bits - 1)), (1 << (bits - 1)) - 1, bits, bits)

    @classmethod
    def naturals(cls, bits: int) -> "NumberType":
        """Integers from 0 of ``bits`` bits, at most 7."""
        return cls(0, (1 << bits) - 1, bits, bits)

    @property
    def floating(self) -> bool:
        """Whether the step grows with the number."""
        return self.mantissa_bits != self.least_exponent

    @property
    def compiled(self) -> CompiledNumbers:
        """The arguments of ``nearest_number``."""
        least = np.int32(self.least_exponent + _EXPONENT_BIAS)
        return np.float32(self.qmin), np.float32(self.qmax), np.int32(self.mantissa_bits), least

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest numbers to ``values`` (float32), half to even; the PyTorch twin of ``nearest_number``."""
        clamped = torch.clamp(values, self.qmin, self.qmax)
        if not self.floating:
            return torch.round(clamped)
        if self == E4M3:  # as PyTorch casts
            return clamped.to(torch.float8_e4m3fn).to(values.dtype)
        exponent = (torch.frexp(clamped).exponent - 1).clamp(min=self.least_exponent)
        step = torch.ldexp(torch.ones_like(clamped), exponent - self.mantissa_bits)
        return torch.round(clamped / step) * step

    def codes_of(self, numbers: torch.Tensor) -> torch.Tensor:
        """Codes (int8) of ``numbers``: integers as they are, others as their bits in E4M3, which has all of E2M1."""
        return numbers.to(torch.float8_e4m3fn).view(torch.int8) if self.floating else numbers.to(torch.int8)

    def coded(self, codes: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Codes as ``codes_of`` gives them, of ``values``, numbers times ``scale``; integers are known as ``codes``."""
        return self.codes_of(values / scale) if self.floating else codes


# As in the OCP Microscaling specification and in IEEE's style with no infinity (``torch.float8_e4m3fn``).
E2M1 = NumberType(-6.0, 6.0, 1, 0)
E2M1_NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = NumberType(-448.0, 448.0, 3, -6)


def decoded_floats(codes: torch.Tensor) -> torch.Tensor:
    """Floating-point numbers (float32) of their ``codes`` (int8)."""
    return codes.contiguous().view(torch.float8_e4m3fn).float()


def _nearest(
    value: np.float32, qmin: np.float32, qmax: np.float32, mantissa_bits: np.int32, least_exponent: np.int32
) -> tuple[np.float32, np.float32]:
    """The nearest number, and how many steps it is."""
    clamped = min(max(value, qmin), qmax)
    exponent = (
        max((np.float32(clamped).view(np.int32) >> np.int32(_MANTISSA_BITS)) & np.int32(255), least_exponent)
        - mantissa_bits
    )
    step = np.int32(exponent << np.int32(_MANTISSA_BITS)).view(np.float32)
    inverse = np.int32((np.int32(2 * _EXPONENT_BIAS) - exponent) << np.int32(_MANTISSA_BITS)).view(np.float32)
    steps = np.rint(clamped * inverse)
    return steps * step, steps


# Inlined, so that loops over lanes are vectorized.
nearest_number: Callable[..., tuple[np.float32, np.float32]] = numba.njit(inline="always", error_model="numpy")(
    _nearest
)
