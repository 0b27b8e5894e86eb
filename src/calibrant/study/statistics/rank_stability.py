"""Whether another draw would rank the sources alike: Kendall's tau between draws, and the best source of each."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class RankStability:
    """How alike the rankings of single draws are.

    Attributes:
        sources: number of sources.
        draws: number of draws that every source has.
        tau: mean of Kendall's tau-b over all pairs of draws: 1 for equal rankings, 0 on average for rankings by chance;
            None if a tie of all sources leaves no pair to compare.
        same_best: share of pairs of draws in which the same source is best; of ties for the best, the share that both
            have in common.
    """

    sources: int
    draws: int
    tau: float | None
    same_best: float


def rank_stability(values: np.ndarray, *, higher_is_better: bool) -> RankStability | None:
    """The stability of rankings of ``values`` ``[sources, draws]``; None for one source or one draw."""
    sources, draws = values.shape
    if sources < 2 or draws < 2:
        return None
    taus, same = [], []
    best = values == (values.max(axis=0) if higher_is_better else values.min(axis=0))
    for one, other in combinations(range(draws), 2):
        if np.ptp(values[:, one]) and np.ptp(values[:, other]):
            taus.append(float(stats.kendalltau(values[:, one], values[:, other]).statistic))
        same.append((best[:, one] & best[:, other]).sum() / (best[:, one] | best[:, other]).sum())
    return RankStability(sources, draws, float(np.mean(taus)) if taus else None, float(np.mean(same)))
