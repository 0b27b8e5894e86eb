"""Grids with the scales of llama.cpp's types: float16 scales and minima, or integers times those of a super-block.

Scales and minima of a group are fitted by weighted least squares to codes of several ranges, and the best is taken, as
in llama.cpp's quantizer (ggml, ``make_qx_quants`` and ``make_qkx3_quants``); the weights are those of its importance
matrix. Ours: both signs of a scale are tried, a super-block's scale is searched, and minima are fitted again to scales
in their stored form.
"""

from dataclasses import dataclass

import torch

# Ranges that are tried: as many levels more or fewer than the range has, in steps of a tenth.
_STEPS = [step / 10 for step in range(-9, 10)]
# Weights that are fitted at a time: few enough to stay in a cache, enough to be worth a call.
_CACHED = 1 << 17
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
    step = max(1, _CACHED // groups[0].numel())
    parts = [
        _fit(some, weights, bits, kind)
        for some, weights in zip(groups.split(step), importance.split(step), strict=True)
    ]
    joined = {name: [vars(part)[name] for part in parts] for name in vars(parts[0])}
    return StoredScales(**{name: torch.cat(values) for name, values in joined.items() if values[0] is not None})


def _fit(groups: torch.Tensor, importance: torch.Tensor, bits: int, kind: BlockScales) -> StoredScales:
    if kind.minima:
        scale, minimum = _affine(groups, importance, bits)
    else:
        scale, minimum = _signed(groups, importance, bits), torch.zeros_like(groups[..., 0])
    if kind.groups == 1:
        stored = _float16(scale)
        if not kind.minima:
            return StoredScales(stored)
        lowest = _refitted_minimum(groups, importance, stored.float(), minimum, bits)
        return StoredScales(stored, lowest.clamp(max=_FLOAT16[1]).half())
    weight = importance.sum(-1)
    shared, sub_scale = _shared(scale, weight, kind)
    if not kind.minima:
        return StoredScales(shared, sub_scale=sub_scale)
    rounded, _ = StoredScales(shared, sub_scale=sub_scale).of_groups()
    fitted = _refitted_minimum(groups, importance, rounded, minimum, bits)
    lowest, sub_minimum = _shared(fitted.clamp(min=0), weight, BlockScales(True, kind.groups, kind.largest), least=0)
    return StoredScales(shared, lowest, sub_scale, sub_minimum.to(torch.uint8))


def _signed(groups: torch.Tensor, importance: torch.Tensor, bits: int) -> torch.Tensor:
    """Scales ``[rows, groups]`` of codes from ``-2^(bits-1)``, of either sign."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    largest = groups.abs().amax(-1)
    best = torch.full_like(largest, torch.inf)
    found = torch.ones_like(largest)
    for step in _STEPS:
        for sign in (1.0, -1.0):
            tried = sign * largest / (-low + step)
            codes = _codes(groups, tried, low, high)
            scale = _quotient((importance * groups * codes).sum(-1), (importance * codes.square()).sum(-1), tried)
            codes = _codes(groups, scale, low, high)
            error = (importance * (groups - scale[..., None] * codes).square()).sum(-1)
            better = error < best
            best, found = torch.where(better, error, best), torch.where(better, scale, found)
    return found


def _affine(groups: torch.Tensor, importance: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima ``[rows, groups]`` of ``w = scale q - minimum``, with codes from 0; minima are not negative."""
    high = (1 << bits) - 1
    low, top = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    # A group of zeros wants no scale: it would widen those of the super-block.
    found_scale, found_minimum = (top > low).to(low.dtype), torch.zeros_like(low)
    total, mean = importance.sum(-1), (importance * groups).sum(-1)
    for step in [*_STEPS, *(step + 2 for step in _STEPS[::3])]:
        tried = (top - low) / max(high + step, 1.0)
        codes = _codes(groups - low[..., None], tried, 0, high)
        ones, squares = (importance * codes).sum(-1), (importance * codes.square()).sum(-1)
        products = (importance * groups * codes).sum(-1)
        determinant = total * squares - ones.square()
        scale = _quotient(total * products - mean * ones, determinant, tried)
        minimum = -_quotient(squares * mean - ones * products, determinant, low)
        negative = minimum < 0
        scale = torch.where(negative, _quotient(products, squares, tried), scale)
        minimum = torch.where(negative, 0.0, minimum)
        for one, other in ((scale, minimum), (tried, -low)):
            error = _error(groups, importance, one, other, high)
            better = (error < best) & (one > 0)
            best = torch.where(better, error, best)
            found_scale = torch.where(better, one, found_scale)
            found_minimum = torch.where(better, other, found_minimum)
    return found_scale, found_minimum


def _refitted_minimum(
    groups: torch.Tensor, importance: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, bits: int
) -> torch.Tensor:
    """The minimum that fits a ``scale`` in its stored form, and codes that fit both, if the error is less."""
    high = (1 << bits) - 1
    codes = _codes(groups + minimum[..., None], scale, 0, high)
    fitted = (importance * (scale[..., None] * codes - groups)).sum(-1) / importance.sum(-1).clamp(min=1e-30)
    fitted = fitted.clamp(min=0)
    before, after = (_error(groups, importance, scale, one, high) for one in (minimum, fitted))
    return torch.where(after < before, fitted, minimum)


def _error(
    groups: torch.Tensor, importance: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, high: int
) -> torch.Tensor:
    codes = _codes(groups + minimum[..., None], scale, 0, high)
    values = scale[..., None] * codes - minimum[..., None]
    return (importance * (groups - values).square()).sum(-1)


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


def _codes(groups: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    safe = torch.where(scale == 0, 1.0, scale)
    return (groups / safe[..., None]).round().clamp(low, high)


def _quotient(numerator: torch.Tensor, denominator: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    found = numerator / denominator
    return torch.where(found.isfinite() & (found != 0), found, otherwise)
