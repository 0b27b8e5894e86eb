"""Holm's correction for several comparisons (Holm 1979)."""

from collections.abc import Sequence

import numpy as np


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the given order: below ``alpha`` where Holm's procedure rejects at level ``alpha``.

    The ``i``-th smallest of ``m`` is multiplied by ``m - i + 1``; none is smaller than the one before, none above 1.
    The chance of any false finding among all comparisons is at most ``alpha``, whatever their dependence.
    """
    given = np.array(p_values, dtype=np.float64)
    order = np.argsort(given, kind="stable")
    scaled = given[order] * np.arange(len(given), 0, -1)
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(value) for value in adjusted]
