"""P(A > B), the probability that a draw of A is better than a draw of B (Bouthillier et al., arXiv 2103.03098)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from calibrant.errors import CalibrantError
from calibrant.study.statistics.bootstrap import RESAMPLES, percentile_interval, resampled
from calibrant.study.statistics.describe import Interval

# Of the paper: below it, an improvement that can be detected is not worth having.
THRESHOLD = 0.75
Verdict = Literal["no evidence", "detectable, too small to matter", "better"]


@dataclass(frozen=True)
class Improvement:
    """How often A is better than B.

    Attributes:
        probability: share of pairs of draws in which A is better; ties count one half.
        interval: percentile bootstrap interval over draws; None for one draw of either. It is too short for few draws:
            of 5 it covers the truth in about 88 % (docs/statistics.md "Coverage"), and if A is better in every pair it
            is [1, 1], however few the draws are.
        verdict: "no evidence" if the interval's lower end is at most 0.5 or there is no interval; otherwise "better"
            if the probability is at least 0.75, else "detectable, too small to matter".
    """

    probability: float
    interval: Interval | None
    verdict: Verdict


def probability_of_improvement(
    first: np.ndarray,
    second: np.ndarray,
    rng: np.random.Generator,
    *,
    higher_is_better: bool,
    paired: bool,
    resamples: int = RESAMPLES,
) -> Improvement:
    """The probability that a draw of ``first`` ``[draws]`` is better than one of ``second`` ``[draws]``.

    ``paired``: share of draws; otherwise share of all pairs, and both are resampled on their own. Two equal sources of
    5 draws each are called "better" the one than the other, in either direction, in about one of ten studies
    (docs/statistics.md "False findings"): with few draws go by the comparisons that are corrected for their number.

    Raises:
        CalibrantError: there are no draws, or pairs of different numbers of draws.
    """
    if len(first) == 0 or len(second) == 0 or (paired and len(first) != len(second)):
        raise CalibrantError(f"{len(first)} and {len(second)} draws cannot be compared; give draws of both")
    gains = first - second if paired else first[:, None] - second[None, :]
    wins = (np.sign(gains if higher_is_better else -gains) + 1) / 2
    probability = float(wins.mean())
    if min(len(first), len(second)) == 1:
        return Improvement(probability, None, "no evidence")
    estimates = _counts(len(first), rng, resamples) @ wins / len(first)
    if not paired:
        estimates = (estimates * _counts(len(second), rng, resamples)).sum(axis=1) / len(second)
    interval = percentile_interval(estimates)
    return Improvement(probability, interval, _verdict(probability, interval.low))


def _counts(draws: int, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """How often each draw is in each resample, int64 ``[resamples, draws]``."""
    places = resampled(draws, rng, resamples) + draws * np.arange(resamples)[:, None]
    return np.bincount(places.ravel(), minlength=resamples * draws).reshape(resamples, draws)


def _verdict(probability: float, low: float) -> Verdict:
    if low <= 0.5:
        return "no evidence"
    return "better" if probability >= THRESHOLD else "detectable, too small to matter"
