"""Which source to take, with few cells: draws are added only for sources that are not yet known to be worse.

Successive halving (Jamieson and Talwalkar 2016) with tests in place of a fixed share: a source is dropped when a
simultaneous interval says that it is worse than the best, so that cells go to what is still open.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from scipy import special

from calibrant.errors import CalibrantError
from calibrant.study.statistics.describe import LEVEL, Interval, mean_and_sd
from calibrant.wording import listed

FIRST_DRAWS = 3
# The scores of sources at draws; what is asked for at once may be computed at once.
ScoresOf = Callable[[Sequence[tuple[str, int]]], Sequence[float]]


@dataclass(frozen=True)
class AgainstBest:
    """One source against the best one when it was last looked at.

    ``difference`` is the source's mean less that of ``best`` over ``draws`` paired draws, None where the source failed:
    a score of it was missing or not finite. ``interval`` holds together with all others of the search; None where the
    draws differ by the same each time, so that no spread was seen.
    """

    source: str
    best: str
    draws: int
    difference: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Recommendation:
    """The end of a search.

    Attributes:
        recommended: the source to take; None if those in ``alike`` cannot be told apart, or no other source was
            compared with the one that is left.
        alike: the sources that remain, best mean first.
        against_best: every other remaining source against the first of ``alike``.
        dropped: sources that are worse, or that failed, in the order they were dropped.
        cells: number of scores that were asked for.
        ended: why the search ended: one source is left at most, all differences are too small to matter, or the budget
            or the draws are used up.
        scores: all scores, by source and draw.
        possible: the largest difference between two of ``alike`` that their intervals allow; None where one of them has
            no interval, or one source is left.
    """

    recommended: str | None
    alike: tuple[str, ...]
    against_best: tuple[AgainstBest, ...]
    dropped: tuple[AgainstBest, ...]
    cells: int
    ended: Literal["one is left", "too small to matter", "budget", "draws"]
    scores: dict[str, tuple[float, ...]]
    possible: float | None

    @property
    def sentence(self) -> str:
        """What to take, in one sentence."""
        said = f"{self._finding()} ({self.cells} cells)."
        if not self.failed:
            return said
        return f"{said} {listed(self.failed)} failed and {'are' if len(self.failed) > 1 else 'is'} not compared."

    @property
    def failed(self) -> tuple[str, ...]:
        """Sources with a score that is missing or not finite."""
        return tuple(one.source for one in self.dropped if one.difference is None)

    def _finding(self) -> str:
        if not self.alike:
            return "No source can be recommended"
        if self.recommended is not None:
            others = "every other source that ran" if self.failed else "every other source"
            return f"Take {self.recommended}" + f": {others} is worse" * (len(self.scores) > 1)
        if len(self.alike) == 1:
            return f"Nothing can be recommended: {self.alike[0]} has nothing to be compared with"
        said = f"{listed(self.alike)} cannot be told apart with {len(self.scores[self.alike[0]])} draws"
        if self.ended == "too small to matter":
            return f"{said}, and their differences are too small to matter: any will do"
        what = "budget is" if self.ended == "budget" else "draws are"
        size = "any size" if self.possible is None else f"up to {self.possible:.2g}"
        return f"{said}: the {what} used up, and differences of {size} are still possible"


def recommend(
    sources: Sequence[str],
    scores_of: ScoresOf,
    *,
    higher_is_better: bool,
    budget: int,
    most_draws: int | None = None,
    smallest_difference: float = 0.0,
) -> Recommendation:
    """Find the source to take with at most ``budget`` scores.

    Every source gets 3 draws; every round doubles the draws of those that remain, as far as the budget reaches. After
    round ``r`` a source is dropped if it is worse than the best by a paired t interval of level
    ``1 - 0.05 / (r (r + 1) m)`` with ``m`` the number of all pairs of sources. These add up to 5 % over all pairs and
    rounds (Bonferroni), so that for normal differences the best source is dropped in at most 5 % of searches, however
    long they are and whatever the spreads.

    Args:
        sources: names of the candidates.
        scores_of: gives scores of sources at their draws 0, 1, ...; one that is not finite drops its source, as failed.
        higher_is_better: direction of the score.
        budget: most scores to ask for.
        most_draws: number of draws that every source has.
        smallest_difference: the search ends when the intervals of all pairs of remaining sources lie within this
            distance of 0.

    Raises:
        CalibrantError: there are no sources, one is named twice, or the budget is too small for the first round.
    """
    if not sources or len(set(sources)) < len(sources):
        raise CalibrantError("name every source once, and at least one")
    if len(sources) > 1 and budget < FIRST_DRAWS * len(sources):
        raise CalibrantError(
            f"{budget} cells are too few for {len(sources)} sources: use a `budget` of {FIRST_DRAWS * len(sources)} "
            "or more, or fewer sources"
        )
    if not smallest_difference >= 0:
        raise CalibrantError(f"smallest difference {smallest_difference}: use 0 or more")
    if most_draws is not None and most_draws < FIRST_DRAWS:
        raise CalibrantError(f"{most_draws} draws are too few for a search: every source needs {FIRST_DRAWS}")
    scores: dict[str, list[float]] = {source: [] for source in sources}
    remaining, against, dropped = sorted(sources), list[AgainstBest](), list[AgainstBest]()
    draws, cells, look, possible = 0, 0, 0, None
    ended: Literal["one is left", "too small to matter", "budget", "draws"] = "one is left"
    while len(remaining) > 1:
        more = min(max(draws, FIRST_DRAWS), (budget - cells) // len(remaining))
        more = more if most_draws is None else min(more, most_draws - draws)
        if more == 0:
            ended = "draws" if draws == most_draws else "budget"
            break
        asked = [(source, draw) for draw in range(draws, draws + more) for source in remaining]
        for (source, _), score in zip(asked, scores_of(asked), strict=True):
            scores[source].append(score)
        draws, cells, look = draws + more, cells + more * len(remaining), look + 1
        failed = [source for source in remaining if not all(map(math.isfinite, scores[source]))]
        remaining = [source for source in remaining if source not in failed]
        error = (1 - LEVEL) / (look * (look + 1) * math.comb(len(sources), 2))
        remaining, against = _against_best(scores, remaining, higher_is_better, error)
        dropped += [AgainstBest(source, remaining[0] if remaining else "", draws, None, None) for source in failed]
        worse = [one for one in against if _is_worse(one, higher_is_better)]
        dropped += worse
        against = [one for one in against if one not in worse]
        remaining = [source for source in remaining if source not in [one.source for one in worse]]
        possible = _possible(scores, remaining, error)
        if possible is not None and possible <= smallest_difference:
            ended = "too small to matter"
            break
    is_compared = len(sources) == 1 or any(one.interval is not None for one in dropped)
    return Recommendation(
        remaining[0] if len(remaining) == 1 and is_compared else None,
        tuple(remaining),
        tuple(against),
        tuple(dropped),
        cells,
        ended,
        {source: tuple(own) for source, own in scores.items()},
        possible,
    )


def _against_best(
    scores: dict[str, list[float]], remaining: list[str], higher_is_better: bool, error: float
) -> tuple[list[str], list[AgainstBest]]:
    """The remaining sources, best mean first, and all but the first against it."""
    sign = -1 if higher_is_better else 1
    values = {source: np.array(scores[source]) for source in remaining}
    ranked = sorted(remaining, key=lambda source: (sign * mean_and_sd(values[source])[0], source))
    against = []
    for source in ranked[1:]:
        difference, interval = _interval(values[source], values[ranked[0]], error)
        against.append(AgainstBest(source, ranked[0], len(values[source]), difference, interval))
    return ranked, against


def _interval(first: np.ndarray, second: np.ndarray, error: float) -> tuple[float, Interval | None]:
    """Mean difference of paired scores and its interval of level ``1 - error``; none without spread, unless equal."""
    difference, sd = mean_and_sd(first - second)
    assert sd is not None  # every round has at least three draws
    if sd == 0 and difference != 0:
        return difference, None
    reach = float(special.stdtrit(len(first) - 1, 1 - error / 2)) * sd / math.sqrt(len(first))
    return difference, Interval(difference - reach, difference + reach)


def _possible(scores: dict[str, list[float]], remaining: list[str], error: float) -> float | None:
    """The largest difference between two remaining sources that their intervals allow."""
    pairs = [_interval(np.array(scores[a]), np.array(scores[b]), error)[1] for a, b in combinations(remaining, 2)]
    ends = [max(-one.low, one.high) for one in pairs if one is not None]
    return max(ends) if ends and len(ends) == len(pairs) else None


def _is_worse(one: AgainstBest, higher_is_better: bool) -> bool:
    if one.interval is None:
        return False
    return one.interval.high < 0 if higher_is_better else one.interval.low > 0
