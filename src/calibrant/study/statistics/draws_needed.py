"""The number of draws that a comparison needs to see a given difference, by the power of the t test."""

import math

import numpy as np
from scipy import special

ALPHA = 0.05
POWER = 0.8
# Standard errors beyond which the power is 1 with any number of draws.
_CERTAIN = 100.0


def power_of_t_test(draws: int, difference: float, sd: float, *, paired: bool) -> float:
    """The chance that a two-sided t test at 5 % finds a true ``difference`` with ``draws`` draws of each.

    ``sd`` is the standard deviation of a source's draws, or of the paired differences; it must be above 0. Noncentral t
    with ``2n - 2`` degrees of freedom and ``difference / (sd sqrt(2 / n))``; paired with ``n - 1`` and
    ``difference / (sd / sqrt(n))`` (Cohen 1988, chapter 2).
    """
    degrees = draws - 1 if paired else 2 * draws - 2
    shift = min(abs(difference) / sd * math.sqrt(draws / (1 if paired else 2)), _CERTAIN)
    critical = float(special.stdtrit(degrees, 1 - ALPHA / 2))
    # Its square is a noncentral F; scipy's noncentral t is not a number where its left tail is almost nothing.
    return float(1 - special.ncfdtr(1, degrees, shift**2, critical**2))


def draws_needed(difference: float, sd: float, *, paired: bool) -> int | None:
    """The fewest draws, at least 2, with which a true ``difference`` is found in 80 % of studies.

    See ``power_of_t_test``. The test is not corrected for other comparisons. None where nothing can be said: the
    difference or ``sd`` is 0, or the difference is so small that more than a million draws would be needed.
    """
    if difference == 0 or sd == 0:
        return None
    quantiles = float(np.sum(special.ndtri([1 - ALPHA / 2, POWER])))
    with_known_sd = (1 if paired else 2) * (quantiles * sd / difference) ** 2
    if with_known_sd > 1_000_000:
        return None
    draws = max(2, math.floor(with_known_sd))  # an estimated sd never needs fewer
    while power_of_t_test(draws, difference, sd, paired=paired) < POWER:
        draws += 1
    return draws
