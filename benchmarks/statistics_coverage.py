"""How the statistics of studies behave over simulated studies of known truth: coverage, false findings, power.

    python benchmarks/statistics_coverage.py [--studies 4000]

Every number is a share of simulated studies of normal draws, with 3, 5 and 10 draws a source. The same number of
studies gives the same shares.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import scipy
from rich.console import Console
from rich.table import Table
from scipy import special

from calibrant.randomness import make_rng
from calibrant.study.statistics.comparisons import compare_sources
from calibrant.study.statistics.describe import Interval
from calibrant.study.statistics.draws_needed import draws_needed, power_of_t_test
from calibrant.study.statistics.improvement import Improvement, probability_of_improvement
from calibrant.study.statistics.paired_difference import paired_difference
from calibrant.study.statistics.simultaneous import FEWEST_DRAWS, simultaneous_intervals
from calibrant.study.statistics.variance_components import variance_components

DRAWS = (3, 5, 10)
SOURCES = 5
RESAMPLES = 2_000
UNEQUAL = np.array([0.2, 0.6, 1.0, 1.5, 2.0])
Study = Callable[[int, np.random.Generator], dict[str, bool | None]]


def holds(interval: Interval | None, truth: float) -> bool | None:
    """Whether the interval covers the truth; None if there is none."""
    return None if interval is None else interval.low <= truth <= interval.high


def a_difference(draws: int, rng: np.random.Generator) -> dict[str, bool | None]:
    """Paired differences of mean 0.3 and standard deviation 1."""
    found = paired_difference(rng.normal(0.3, 1, draws), np.zeros(draws), rng, RESAMPLES)
    return {
        "coverage: mean difference, t interval": holds(found.interval, 0.3),
        "coverage: mean difference, percentile bootstrap": holds(found.bootstrap, 0.3),
    }


def an_improvement(draws: int, rng: np.random.Generator) -> dict[str, bool | None]:
    """Two sources with P(A > B) of 0.5, and of 0.75."""

    def improvement(shift: float, paired: bool) -> Improvement:
        first, second = rng.normal(shift, 1, draws), rng.normal(0, 1, draws)
        return probability_of_improvement(first, second, rng, higher_is_better=True, paired=paired, resamples=RESAMPLES)

    shift = float(special.ndtri(0.75)) * 2**0.5
    equal, better, pairs = improvement(0, False), improvement(shift, False), improvement(0, True)
    return {
        "coverage: P(A > B) = 0.5": holds(equal.interval, 0.5),
        "coverage: P(A > B) = 0.75": holds(better.interval, 0.75),
        'false: "better" of two equal sources, one direction': equal.verdict == "better",
        'false: "better" of two equal sources, one direction, paired': pairs.verdict == "better",
        'found: "better" where P(A > B) = 0.75': better.verdict == "better",
    }


def components(draws: int, rng: np.random.Generator) -> dict[str, bool | None]:
    """Sources and draws with a variance of 1 each; unbalanced: 2 draws fewer to 2 more, at least 2."""

    def groups(sizes: list[int]) -> list[np.ndarray]:
        return [rng.normal(rng.normal(), 1, size) for size in sizes]

    even = variance_components(groups([draws] * SOURCES))
    uneven = variance_components(groups([max(2, draws + step) for step in (-2, -1, 0, 1, 2)]))
    assert even is not None
    assert uneven is not None
    return {
        "coverage: variance of draws": holds(even.draw_interval, 1),
        "coverage: variance of sources": holds(even.source_interval, 1),
        "coverage: share of the source": holds(even.share_interval, 0.5),
        "coverage: variance of draws, unbalanced": holds(uneven.draw_interval, 1),
        "coverage: variance of sources, unbalanced": holds(uneven.source_interval, 1),
        "coverage: share of the source, unbalanced": holds(uneven.share_interval, 0.5),
    }


def comparisons(draws: int, rng: np.random.Generator) -> dict[str, bool | None]:
    """Five sources of equal mean, with equal spreads, with spreads of 0.2 to 2, and with a common part of each draw."""
    normal = rng.standard_normal((SOURCES, draws))
    pairs = [(i, j) for i in range(SOURCES) for j in range(i)]
    found: dict[str, bool | None] = {}
    for name, values, paired in (
        ("", normal, False),
        (", spreads of 0.2 to 2", normal * UNEQUAL[:, None], False),
        (", paired", normal + 2 * rng.standard_normal(draws), True),
    ):
        named = {str(source): own for source, own in enumerate(values)}
        compared = compare_sources(named, lambda *_: rng, higher_is_better=True, paired=paired, resamples=50)
        found["false: any of five equal sources told apart" + name] = any(one.told_apart for one in compared)
        together = simultaneous_intervals(list(values), pairs, rng, paired=paired, resamples=RESAMPLES)
        covered = None if together is None else all(holds(one, 0) for one in together)
        found["coverage: all differences together" + name] = covered
    return found


def the_power(studies: int) -> Iterator[tuple[str, float]]:
    """Shares of t tests that find a difference with the number of draws that it is said to need."""
    for paired in (False, True):
        for difference in (0.5, 1.0, 2.0):
            draws = draws_needed(difference, 1, paired=paired)
            assert draws is not None
            rng = make_rng(0, "power", draws, int(paired))
            found = rng.normal(difference, 1, (studies, draws))
            other = np.zeros((studies, 1)) if paired else rng.standard_normal((studies, draws))
            squares = found.var(1, ddof=1) + (0 if paired else other.var(1, ddof=1))
            t = (found.mean(1) - other.mean(1)) / np.sqrt(squares / draws)
            critical = special.stdtrit(draws - 1 if paired else 2 * draws - 2, 0.975)
            kind = "paired" if paired else "unpaired"
            yield f"{kind}, difference {difference} sd, {draws} draws", float((np.abs(t) > critical).mean())
            yield (
                f"{kind}, difference {difference} sd, {draws} draws, by formula",
                power_of_t_test(draws, difference, 1, paired=paired),
            )


def shares(study: Study, draws: int, studies: int) -> dict[str, float | None]:
    """Share of ``studies`` studies in which each thing holds; None if it is undefined with so few draws."""
    counts: dict[str, list[bool | None]] = {}
    for number in range(studies):
        for name, held in study(draws, make_rng(0, study.__name__, draws, number)).items():
            counts.setdefault(name, []).append(held)
    return {name: None if None in held else round(sum(map(bool, held)) / studies, 4) for name, held in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=4_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/statistics_coverage.json")
    given = parser.parse_args()
    found: dict[str, dict[int, float | None]] = {}
    for study in (a_difference, an_improvement, components, comparisons):
        for draws in DRAWS:
            for name, share in shares(study, draws, given.studies).items():
                found.setdefault(name, {})[draws] = share
    power = dict(the_power(100 * given.studies))
    table = Table("statistic", *(f"{draws} draws" for draws in DRAWS))
    for name, by_draws in sorted(found.items()):
        table.add_row(name, *("-" if share is None else f"{share:.3f}" for share in by_draws.values()))
    Console().print(table)
    for name, share in power.items():
        Console().print(f"{share:.3f}  {name}")
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"numpy": np.__version__, "scipy": scipy.__version__},
        "studies": given.studies,
        "sources": SOURCES,
        "resamples": RESAMPLES,
        "fewest_draws_of_simultaneous_intervals": FEWEST_DRAWS,
        "shares": found,
        "power": power,
    }
    given.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
