"""Fitting grids to weights: from minimum and maximum (the plain range), or by a search among candidate ranges.

- "mse": ranges shrunk by whole percents; the cost is ``|e|^2.4`` of the weights (released code of GPTQ, arXiv
  2210.17323);
- "importance": scales around the plain one, each refitted by least squares; the cost is the squared error weighted by
  the Hessian's diagonal (llama.cpp's importance matrix, on our grids);
- "clip": magnitudes clipped at 95 %, 90 %, ... 55 %; the cost is the group's squared output error (released code of
  AWQ, arXiv 2306.00978; ours: on the Hessian of all counted tokens instead of a sample of tokens);
- "four-over-six": the largest weight of a group at 6 or at 4, whichever squared error is less (arXiv 2512.02010), for
  four-bit floats.

The plain range is the first candidate, so no search ends with a higher cost. With signed scales a
search tries every scale with both signs, as llama.cpp does for Q4_0 and Q3_K.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from calibrant.kernels.group_moments import WeightedGroups
from calibrant.kernels.range_search import cheapest_range
from calibrant.kernels.row_tiles import row_chunks
from calibrant.quantization.block_scales import fit_block_scales
from calibrant.quantization.grids import Grid, GridSpec, encode_groups, parameters, stored_scale

_SHRINK_STEPS = 80
_SHRINK_POINTS = 100
_SHRINK_NORM = 2.4
_CLIP_STEPS = 10
_CLIP_POINTS = 20
# llama.cpp tries 19 scales around the plain one, in steps of a tenth of a level.
_SCALE_STEPS = 9
_SCALE_STEP_LEVELS = 0.1
# Floats have no even steps: a group may want its largest weight far from the largest number (ours).
_FLOAT_FACTORS = (0.5, 0.75, 1.5, 2.0)

# Of scales and zero points, by group.
Cost = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Parameters = tuple[torch.Tensor, torch.Tensor]


def fit_grid(weight: torch.Tensor, spec: GridSpec, hessian: torch.Tensor | None = None) -> Grid:
    """Fit the grid of every group of ``weight`` ``[rows, in]`` (float32); ``in`` must be a multiple of the group size.

    Ranges always include 0, so 0.0 is representable. ``hessian`` is ``sum x x^T`` of the inputs, float32 ``[in, in]``;
    for "importance" its diagonal ``[in]`` is enough. Searches that need it keep the plain range if it is None.
    """
    spec = spec.for_weight(weight)
    if spec.scale_rows == 1 and spec.blocks is None:
        parts = [_fit(weight[rows], spec, hessian) for rows in row_chunks(weight)]
        return Grid(spec, torch.cat([part.scale for part in parts]), torch.cat([part.zero_point for part in parts]))
    return _fit(weight, spec, hessian)


def _fit(weight: torch.Tensor, spec: GridSpec, hessian: torch.Tensor | None) -> Grid:
    """``fit_grid`` of rows whose scales do not depend on other rows."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, spec.group_size or columns).float()
    if spec.blocks is not None:
        diagonal = torch.ones(columns) if hessian is None or spec.range_search == "none" else hessian
        diagonal = diagonal.diagonal() if diagonal.ndim == 2 else diagonal
        importance = _importance(groups, weight, diagonal.to(groups.device))
        return Grid.of_blocks(spec, fit_block_scales(groups, importance, spec.bits, spec.blocks))
    low = _shared(groups.amin(-1).clamp(max=0), spec.scale_rows, torch.amin)
    high = _shared(groups.amax(-1).clamp(min=0), spec.scale_rows, torch.amax)
    if spec.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    plain = parameters(low, high, spec)
    if spec.range_search == "mse":
        tried = _both_signs(plain, _shrunk(low, high, spec), spec)
        return Grid(spec, *_cheapest(plain, tried, partial(_power_cost, groups, spec)))
    if spec.range_search == "four-over-six":
        wider = iter([parameters(1.5 * low, 1.5 * high, spec)])
        weighted = WeightedGroups(groups, torch.ones_like(groups), spec.numbers)
        return Grid(spec, *_cheapest(plain, wider, lambda *one: weighted.moments(*one).error))
    if spec.range_search == "importance" and hessian is not None:
        diagonal = hessian.diagonal() if hessian.ndim == 2 else hessian
        weighted = WeightedGroups(groups, _importance(groups, weight, diagonal), spec.numbers)
        tried = _refitted(weighted, _both_signs(plain, _scaled(low, high, spec), spec), spec)
        return Grid(spec, *_cheapest(plain, tried, lambda *one: weighted.moments(*one).error))
    if spec.range_search == "clip" and hessian is not None:
        tried = _both_signs(plain, _clipped(low, high, spec), spec)
        return Grid(spec, *_best_clipped(groups, [plain, *tried], hessian, spec))
    return Grid(spec, *plain)


def rounded(values: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """``values`` ``[.., n]`` (float32) on symmetric grids of ``spec``, whose scales come from the values."""
    groups = values.unflatten(-1, (-1, spec.group_size or values.shape[-1]))
    largest = groups.abs().amax(-1)
    scale, zero_point = (one[..., None] for one in parameters(-largest, largest, spec))
    return ((encode_groups(groups, scale, zero_point, spec) - zero_point) * scale).flatten(-2)


def _shared(bounds: torch.Tensor, scale_rows: int | None, reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
    """``bounds`` ``[rows, groups]`` with one value for all rows that share a scale."""
    if scale_rows == 1:
        return bounds
    size = scale_rows or len(bounds)
    blocks = bounds.view(-1, size, bounds.shape[1])
    return reduce(blocks, dim=1).repeat_interleave(size, dim=0)


def _cheapest(plain: Parameters, candidates: Iterator[Parameters], cost: Cost) -> Parameters:
    """The cheapest parameters of every group; ties go to the first."""
    scale, zero_point = plain
    best = cost(scale, zero_point)
    for tried_scale, tried_zero_point in candidates:
        error = cost(tried_scale, tried_zero_point)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero_point = torch.where(better, tried_scale, scale), torch.where(better, tried_zero_point, zero_point)
    return scale, zero_point


def _both_signs(plain: Parameters, candidates: Iterator[Parameters], spec: GridSpec) -> Iterator[Parameters]:
    """``candidates``, with signed scales also their opposites and that of ``plain``."""
    if not spec.signed_scales:
        yield from candidates
        return
    yield -plain[0], plain[1]
    for scale, zero_point in candidates:
        yield scale, zero_point
        yield -scale, zero_point


def _shrunk(low: torch.Tensor, high: torch.Tensor, spec: GridSpec) -> Iterator[Parameters]:
    for step in range(1, _SHRINK_STEPS):
        share = 1 - step / _SHRINK_POINTS
        yield parameters(low * share, high * share, spec)


def _power_cost(groups: torch.Tensor, spec: GridSpec, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    codes = encode_groups(groups, scale[..., None], zero_point[..., None], spec)
    return (((codes - zero_point[..., None]) * scale[..., None] - groups).abs() ** _SHRINK_NORM).sum(-1)


def _clipped(low: torch.Tensor, high: torch.Tensor, spec: GridSpec) -> Iterator[Parameters]:
    largest = torch.maximum(-low, high)
    for step in range(1, _CLIP_STEPS):
        bound = largest * (1 - step / _CLIP_POINTS)
        yield parameters(torch.maximum(low, -bound), torch.minimum(high, bound), spec)


def _best_clipped(
    groups: torch.Tensor, candidates: list[Parameters], hessian: torch.Tensor, spec: GridSpec
) -> Parameters:
    """The parameters with the smallest ``e H_g e`` of every group, H_g the group's block of ``hessian``."""
    count, width = groups.shape[1:]
    blocks = torch.stack([hessian[i : i + width, i : i + width] for i in range(0, count * width, width)])
    scales, zero_points = (torch.stack(values, 1) for values in zip(*candidates, strict=True))
    best = cheapest_range(groups.flatten(1), scales, zero_points, blocks, spec.numbers)[:, None]
    return scales.gather(1, best)[:, 0], zero_points.gather(1, best)[:, 0]


def _importance(groups: torch.Tensor, weight: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """``H_jj sqrt(sigma^2 + w_j^2)``, sigma^2 the row's mean square, shaped like ``groups`` (llama.cpp)."""
    spread = weight.square().mean(1)[:, None, None]
    return diagonal.reshape(groups.shape[1:]) * (spread + groups.square()).sqrt()


def _scaled(low: torch.Tensor, high: torch.Tensor, spec: GridSpec) -> Iterator[Parameters]:
    levels = (spec.qmax - spec.qmin) / 2
    factors = [levels / (levels + _SCALE_STEP_LEVELS * step) for step in range(-_SCALE_STEPS, _SCALE_STEPS + 1)]
    for factor in [*factors, *(_FLOAT_FACTORS if spec.floating else ())]:
        yield parameters(low * factor, high * factor, spec)


def _refitted(weighted: WeightedGroups, candidates: Iterator[Parameters], spec: GridSpec) -> Iterator[Parameters]:
    """``candidates`` with the scales that fit their codes best."""
    for scale, zero_point in candidates:
        sums = weighted.moments(scale, zero_point)
        fitted = sums.products / sums.squares
        yield torch.where(fitted * scale > 0, stored_scale(fitted.nan_to_num(), spec), scale), zero_point
