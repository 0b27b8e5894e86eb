"""Percentile bootstrap over draws (Efron 1979)."""

import numpy as np

from calibrant.study.statistics.describe import LEVEL, Interval

RESAMPLES = 10_000


def resampled(draws: int, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Numbers of draws, drawn with replacement: int64 ``[resamples, draws]``."""
    return rng.integers(0, draws, (resamples, draws))


def percentile_interval(estimates: np.ndarray) -> Interval:
    """The middle 95 % of the estimates ``[resamples]`` of all resamples."""
    low, high = np.quantile(estimates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))
