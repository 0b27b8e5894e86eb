"""Source against draw: variance components of one-way random effects (Searle, Casella, McCulloch 1992, chapter 3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from calibrant.study.statistics.describe import LEVEL, Interval

_LOWER, _UPPER = (1 - LEVEL) / 2, (1 + LEVEL) / 2


@dataclass(frozen=True)
class VarianceComponents:
    """How much of the variance comes from the source, how much from the draw.

    Negative estimates and ends of intervals are set to 0.

    Attributes:
        sources: number of sources, ``k``.
        draws: number of draws of all sources together, ``N``.
        balanced: every source has the same number of draws.
        draw_variance: variance between draws of a source, ``MS_w``.
        draw_interval: ``(N - k) MS_w`` over quantiles of chi-square; exact for normal draws of equal variance at any
            number of draws.
        source_variance: ``(MS_b - MS_w) / n0`` with ``n0 = (N - sum n_i^2 / N) / (k - 1)``.
        source_interval: Williams's interval (1962), which covers slightly more than it says, 95 to 96 % at 5 draws of 5
            sources.
        share: ``source_variance / (source_variance + draw_variance)``, the intraclass correlation; None if no draw of a
            source differs from another of it.
        share_interval: from quantiles of F; exact for normal values if balanced, otherwise the approximation of Thomas
            and Hultquist (1978) with the harmonic mean of the numbers of draws. Of few sources it is wide whatever the
            number of draws. At 5 draws of 5 sources it covers 95 % (docs/statistics.md "Coverage").
    """

    sources: int
    draws: int
    balanced: bool
    draw_variance: float
    draw_interval: Interval
    source_variance: float
    source_interval: Interval
    share: float | None
    share_interval: Interval | None


def variance_components(groups: Sequence[np.ndarray]) -> VarianceComponents | None:
    """The components of ``groups``, one array ``[draws]`` per source.

    None if there are fewer than two sources, or no source has two draws.
    """
    sizes = np.array([len(group) for group in groups])
    sources, draws = len(groups), int(sizes.sum())
    if sources < 2 or draws - sources < 1:
        return None
    # A shift changes no variance, and sums of large equal numbers would be rounded.
    shift = float(groups[0][0])
    moved = [group - shift for group in groups]
    means = np.array([group.mean() if np.ptp(group) else group[0] for group in moved])
    within = float(sum(((group - mean) ** 2).sum() for group, mean in zip(moved, means, strict=True)))
    degrees = draws - sources
    mean_within = within / degrees
    mean_between = float((sizes * (means - (sizes * means).sum() / draws) ** 2).sum()) / (sources - 1)
    size = (draws - float((sizes**2).sum()) / draws) / (sources - 1)
    source_variance = max(0.0, (mean_between - mean_within) / size)
    varies = mean_within > 0
    harmonic = sources / float((1 / sizes).sum())
    unweighted = harmonic * float(means.var(ddof=1))
    return VarianceComponents(
        sources,
        draws,
        bool((sizes == sizes[0]).all()),
        mean_within,
        Interval(within / _chi_square(degrees, _UPPER), within / _chi_square(degrees, _LOWER)),
        source_variance,
        _source_interval(unweighted, mean_within, sources - 1, degrees, harmonic),
        source_variance / (source_variance + mean_within) if varies else None,
        _share_interval(unweighted, mean_within, sources - 1, degrees, harmonic) if varies else None,
    )


def _source_interval(between: float, within: float, sources: int, degrees: int, size: float) -> Interval:
    """Williams's interval from mean squares, ``sources`` and ``degrees`` degrees of freedom."""

    def end(quantile: float) -> float:
        excess = sources * (between - within * float(special.fdtri(sources, degrees, quantile)))
        return max(0.0, excess / (size * _chi_square(sources, quantile)))

    return Interval(end(_UPPER), end(_LOWER))


def _share_interval(between: float, within: float, sources: int, degrees: int, size: float) -> Interval:
    """``(f - 1) / (f - 1 + size)`` for the ratio ``f`` of mean squares over quantiles of F."""

    def end(quantile: float) -> float:
        scaled = within * float(special.fdtri(sources, degrees, quantile))
        return max(0.0, (between - scaled) / (between - scaled + size * scaled)) if between > scaled else 0.0

    return Interval(end(_UPPER), end(_LOWER))


def _chi_square(degrees: int, probability: float) -> float:
    return float(special.chdtri(degrees, 1 - probability))
