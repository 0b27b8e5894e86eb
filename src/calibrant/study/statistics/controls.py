"""Controls: what must be zero if a study measures what it says."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Control:
    """A difference that must be zero.

    Attributes:
        values: number of values, or of pairs, that were compared.
        largest_difference: the largest absolute difference among them.
        passes: it is exactly 0.
    """

    values: int
    largest_difference: float
    passes: bool


def zero_control(values: np.ndarray) -> Control | None:
    """Values ``[sets]`` of a recipe that reads no data, such as round-to-nearest, over different sets: all equal.

    None for fewer than two sets.
    """
    return _control(len(values), float(np.ptp(values))) if len(values) > 1 else None


def implementation_noise(pairs: Sequence[tuple[float, float]]) -> Control | None:
    """Values of cells that were run twice on one set: equal, as the same command gives the same bytes.

    Where they are not, no smaller difference between sources means anything. None without pairs.
    """
    return _control(len(pairs), max(abs(first - second) for first, second in pairs)) if pairs else None


def _control(values: int, difference: float) -> Control:
    return Control(values, difference, difference == 0)
