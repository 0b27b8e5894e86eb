"""Grids with the scales of llama.cpp's types: float16 scales and minima, or integers times those of a super-block.

Scales and minima of a group are fitted by weighted least squares to codes of several ranges, and the best is taken, as
in llama.cpp's quantizer (ggml, ``make_qx_quants`` and ``make_qkx3_quants``); the weights are those of its importance
matrix. Ours: both signs of a scale are tried, a super-block's scale is searched, and minima are fitted again to scales
in their stored form.
"""

from dataclasses import dataclass

import torch

from calibrant.kernels.group_moments import Moments, WeightedGroups
from calibrant.kernels.number_types import NumberType

# Ranges that are tried: as many levels more or fewer than the range has, in steps of a tenth.
_STEPS = [step / 10 for step in range(-9, 10)]
# The smallest and the largest number of float16.
_FLOAT16 = 2.0**-24, 65504.0
# The largest integer that a super-block's largest scale becomes is tried from its limit down to this share of it.
_SUPER_SHARES = [1 - step / 40 for step in range(13)]


@dataclass(frozen=True)
class BlockScales:
    """How scales are stored: ``groups`` of them in a super-block (1: none); ``largest`` is the largest integer of a
    group. ``minima``: whether groups have minima; ``signed``: whether integers of scales may be negative."""

    minima: bool
    groups: int = 1
    largest: int = 1
    signed: bool = False


@dataclass(frozen=True)
class StoredScales:
    """``scale`` and ``minimum`` float16 ``[rows, blocks]``; of super-blocks ``sub_scale`` (int8) and ``sub_minimum``
    (uint8) ``[rows, groups]``. A group's scale is ``scale * sub_scale``, its minimum ``minimum * sub_minimum``."""

    scale: torch.Tensor
    minimum: torch.Tensor | None = None
    sub_scale: torch.Tensor | None = None
    sub_minimum: torch.Tensor | None = None

    def of_groups(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and minimum of every group, float32 ``[rows, groups]``; a weight is ``scale q - minimum``."""
        scale = _times(self.scale.float(), self.sub_scale)
        minimum = torch.zeros_like(scale) if self.minimum is None else _times(self.minimum.float(), self.sub_minimum)
        return scale, minimum


def _times(values: torch.Tensor, integers: torch.Tensor | None) -> torch.Tensor:
    if integers is None:
        return values
    return values.repeat_interleave(integers.shape[1] // values.shape[1], dim=1) * integers.float()


def fit_block_scales(groups: torch.Tensor, importance: torch.Tensor, bits: int, kind: BlockScales) -> StoredScales:
    """Fit ``groups`` float32 ``[rows, groups, width]``; squared errors are weighted by ``importance`` (same shape)."""
    numbers = NumberType.naturals(bits) if kind.minima else NumberType.integers(bits)
    weighted, total = WeightedGroups(groups, importance, numbers), importance.sum(-1)
    if kind.minima:
        mean = (importance * groups).sum(-1)
        scale, minimum = _affine(weighted, total, mean)
    else:
        scale = _signed(weighted)
    if kind.groups == 1:
        stored = _float16(scale)
        if not kind.minima:
            return StoredScales(stored)
        lowest = _refitted_minimum(weighted, stored.float(), minimum, total, mean)
        return StoredScales(stored, lowest.clamp(max=_FLOAT16[1]).half())
    shared, sub_scale = _shared(scale, total, kind)
    if not kind.minima:
        return StoredScales(shared, sub_scale=sub_scale)
    rounded, _ = StoredScales(shared, sub_scale=sub_scale).of_groups()
    fitted = _refitted_minimum(weighted, rounded, minimum, total, mean)
    lowest, sub_minimum = _shared(fitted.clamp(min=0), total, BlockScales(True, kind.groups, kind.largest), least=0)
    return StoredScales(shared, lowest, sub_scale, sub_minimum.to(torch.uint8))


def _signed(weighted: WeightedGroups) -> torch.Tensor:
    """Scales ``[rows, groups]`` of codes from ``-2^(bits-1)``, of either sign."""
    largest = weighted.groups.abs().amax(-1)
    best, found, none = torch.full_like(largest, torch.inf), torch.ones_like(largest), torch.zeros_like(largest)
    for step in _STEPS:
        for sign in (1.0, -1.0):
            tried = _divisor(sign * largest / (step - weighted.numbers.qmin))
            sums = weighted.moments(tried, none)
            scale = _quotient(sums.products, sums.squares, tried)
            error = weighted.moments(scale, none).error
            better = error < best
            best, found = torch.where(better, error, best), torch.where(better, scale, found)
    # A group of zeros wants no scale: it would widen those of the super-block.
    return torch.where(largest > 0, found, 0.0)


def _affine(weighted: WeightedGroups, total: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima ``[rows, groups]`` of ``w = scale q - minimum``, with codes from 0; minima are not negative.

    ``total`` is the sum of the importance, ``mean`` that of the weights times it.
    """
    low, top = weighted.groups.amin(-1).clamp(max=0), weighted.groups.amax(-1).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    # Of a group of zeros 0, as above.
    found_scale, found_minimum = (top > low).to(low.dtype), torch.zeros_like(low)
    for step in [*_STEPS, *(step + 2 for step in _STEPS[::3])]:
        tried = (top - low) / max(weighted.numbers.qmax + step, 1.0)
        sums = _moments(weighted, tried, -low)
        ones, products, squares = sums.ones, sums.products, sums.squares
        determinant = total * squares - ones.square()
        scale = _quotient(total * products - mean * ones, determinant, tried)
        minimum = -_quotient(squares * mean - ones * products, determinant, low)
        negative = minimum < 0
        scale = torch.where(negative, _quotient(products, squares, tried), scale)
        minimum = torch.where(negative, 0.0, minimum)
        for one, other, error in (
            (scale, minimum, _moments(weighted, scale, minimum).error), (tried, -low, sums.error)
        ):  # fmt: skip
            better = (error < best) & (one > 0)
            best = torch.where(better, error, best)
            found_scale = torch.where(better, one, found_scale)
            found_minimum = torch.where(better, other, found_minimum)
    return found_scale, found_minimum


def _refitted_minimum(
    weighted: WeightedGroups, scale: torch.Tensor, minimum: torch.Tensor, total: torch.Tensor, mean: torch.Tensor
) -> torch.Tensor:
    """The minimum that fits a ``scale`` in its stored form, and codes that fit both, if the error is less."""
    before = _moments(weighted, scale, minimum)
    fitted = ((scale * before.ones - mean) / total.clamp(min=1e-30)).clamp(min=0)
    return torch.where(_moments(weighted, scale, fitted).error < before.error, fitted, minimum)


def _moments(weighted: WeightedGroups, scale: torch.Tensor, minimum: torch.Tensor) -> Moments:
    divisor = _divisor(scale)
    return weighted.moments(divisor, minimum / divisor, centred=False)


def _shared(
    scale: torch.Tensor, weight: torch.Tensor, kind: BlockScales, least: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float16 scales of super-blocks, and integers of groups, nearest to ``scale`` ``[rows, groups]``.

    No integer of a scale is 0, since scales are divisors; ``least`` 0 is for minima.
    """
    blocks, weights = scale.unflatten(1, (-1, kind.groups)), weight.unflatten(1, (-1, kind.groups))
    largest = blocks.abs().amax(-1)
    # A negative limit reaches one further, and llama.cpp's own quantizer starts there.
    limits = [kind.largest * share for share in _SUPER_SHARES]
    limits += [-limit - 1 for limit in limits] if kind.signed else []
    best = torch.full_like(largest, torch.inf)
    found, integers = torch.ones_like(largest).half(), torch.ones_like(blocks)
    bottom = -kind.largest - 1 if kind.signed else least
    for limit in limits:
        shared = _float16(largest / limit)
        tried = (blocks / shared.float()[..., None]).round().clamp(bottom, kind.largest)
        if least:
            tried = torch.where(tried == 0, torch.where(blocks < 0, -1.0, 1.0) if kind.signed else 1.0, tried)
        error = (weights * (blocks - shared.float()[..., None] * tried).square()).sum(-1)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, shared, found)
        integers = torch.where(better[..., None], tried, integers)
    return found, integers.flatten(1).to(torch.int8)


def _float16(scale: torch.Tensor) -> torch.Tensor:
    """``scale`` in float16, no closer to 0 and no further from it than float16 has numbers; 0 is 1, a divisor."""
    kept = torch.where(scale == 0, 1.0, scale)
    return (kept.abs().clamp(*_FLOAT16) * kept.sign()).half()


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 1.0, scale)


def _quotient(numerator: torch.Tensor, denominator: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    found = numerator / denominator
    return torch.where(found.isfinite() & (found != 0), found, otherwise)
