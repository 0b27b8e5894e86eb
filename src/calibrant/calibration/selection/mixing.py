"""Mixes of scripts or lengths: groups of documents that share a set's rows (ours)."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from calibrant.calibration.filters import Filter
from calibrant.calibration.filters.content import LengthBetween, ScriptIs
from calibrant.calibration.selection.request import MixRequest

_ELSEWHERE = "documents_of_other_groups"
# Every group's pass reads the whole corpus, so these counts do not add up.
_OF_THE_CORPUS = ("documents", "documents_empty", "documents_too_long", "documents_unusable")


def groups_of(mix: MixRequest) -> list[tuple[str, Filter]]:
    """Name and filter of every group; empty without a mix."""
    if mix.scripts:
        return [(script.lower(), ScriptIs(script.upper(), _ELSEWHERE)) for script in mix.scripts]
    if not mix.lengths:
        return []
    bounds = [0, *mix.lengths]
    groups: list[tuple[str, Filter]] = [
        (f"{least}_to_{most - 1}_characters", LengthBetween(least, most - 1, _ELSEWHERE))
        for least, most in pairwise(bounds)
    ]
    return [*groups, (f"from_{bounds[-1]}_characters", LengthBetween(bounds[-1], None, _ELSEWHERE))]


def counts_of_groups(groups: Sequence[tuple[str, int, dict[str, int]]]) -> dict[str, int]:
    """A mix's counts from every group's name, number of rows and counts."""
    total: Counter[str] = Counter()
    for name, rows, counts in groups:
        total[f"rows_{name}"] = rows
        total.update({key: value for key, value in counts.items() if key != _ELSEWHERE})
    shared = groups[0][2]
    return {**total, **{key: shared[key] for key in _OF_THE_CORPUS}}
