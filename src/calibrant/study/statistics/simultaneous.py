"""Simultaneous intervals of all differences between sources: the bootstrap of the largest t (Westfall and Young 1993).

Resampling draws of one source with replacement gives constant samples too often where draws are few, so residuals keep
their places and get random signs (the wild bootstrap, Liu 1988; Mammen 1993), which also keeps every source's spread.
"""

from collections.abc import Sequence

import numpy as np

from calibrant.study.statistics.bootstrap import RESAMPLES
from calibrant.study.statistics.describe import LEVEL, Interval, mean_and_sd

# With three draws the signs have too few patterns: of 8 paired sources a quarter of studies would be covered.
FEWEST_DRAWS = 5
# Resamples whose t are computed at a time.
_CHUNK = 1_000
Pair = tuple[int, int]


def simultaneous_intervals(
    groups: Sequence[np.ndarray],
    pairs: Sequence[Pair],
    rng: np.random.Generator,
    *,
    paired: bool,
    resamples: int = RESAMPLES,
) -> list[Interval] | None:
    """Intervals of the differences of means that all hold together in 95 % of studies.

    Args:
        groups: values of each source ``[draws]``; if ``paired``, entry ``i`` of all is of the same draw.
        pairs: indices of the sources to compare; each interval is of the first less the second.
        rng: draws the signs.
        paired: one sign for all sources of a draw, and standard errors of paired differences; otherwise a sign for
            every value, and Welch's standard errors.
        resamples: number of resamples.

    None if a source has fewer than 5 draws. At 5 draws all differences of five sources are covered together in about
    95 % of studies, also where their spreads differ (docs/statistics.md "Coverage").
    """
    if not pairs or min(map(len, groups)) < FEWEST_DRAWS:
        return None
    first, second = np.array(pairs).T
    residuals = [group - mean_and_sd(group)[0] for group in groups]
    largest = np.concatenate(
        [
            _statistics(_with_signs(residuals, rng, min(_CHUNK, resamples - done), paired), first, second, paired).max(
                0
            )
            for done in range(0, resamples, _CHUNK)
        ]
    )
    reach = float(np.quantile(largest, LEVEL))
    differences, errors = _differences([group[None] for group in groups], first, second, paired)
    return [
        Interval(float(difference - reach * error), float(difference + reach * error))
        for difference, error in zip(differences[:, 0], errors[:, 0], strict=True)
    ]


def _with_signs(residuals: list[np.ndarray], rng: np.random.Generator, count: int, paired: bool) -> list[np.ndarray]:
    """Residuals with random signs, one array ``[count, draws]`` per source."""
    if paired:
        signs = rng.choice([-1.0, 1.0], (count, len(residuals[0])))
        return [residual * signs for residual in residuals]
    return [residual * rng.choice([-1.0, 1.0], (count, len(residual))) for residual in residuals]


def _differences(
    values: list[np.ndarray], first: np.ndarray, second: np.ndarray, paired: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Differences of means and their standard errors, both ``[pairs, resamples]``, of values ``[resamples, draws]``."""
    if paired:
        stacked = np.stack(values)
        gaps = stacked[first] - stacked[second]
        return gaps.mean(axis=-1), gaps.std(axis=-1, ddof=1) / np.sqrt(gaps.shape[-1])
    means = np.stack([value.mean(axis=-1) for value in values])
    squares = np.stack([value.var(axis=-1, ddof=1) / value.shape[-1] for value in values])
    return means[first] - means[second], np.sqrt(squares[first] + squares[second])


def _statistics(values: list[np.ndarray], first: np.ndarray, second: np.ndarray, paired: bool) -> np.ndarray:
    """Absolute t of every pair and resample; 0 where nothing varies."""
    differences, errors = _differences(values, first, second, paired)
    found: np.ndarray = np.divide(np.abs(differences), errors, out=np.zeros_like(errors), where=errors > 0)
    return found
