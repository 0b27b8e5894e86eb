"""Statistics over simulated studies of known truth: intervals cover, tests keep their level and their power."""

import numpy as np
import pytest
from scipy import stats

from calibrant.study.statistics.comparisons import compare_sources
from calibrant.study.statistics.controls import zero_control
from calibrant.study.statistics.describe import Interval, describe
from calibrant.study.statistics.draws_needed import draws_needed, power_of_t_test
from calibrant.study.statistics.improvement import probability_of_improvement
from calibrant.study.statistics.paired_difference import paired_difference
from calibrant.study.statistics.simultaneous import simultaneous_intervals
from calibrant.study.statistics.variance_components import VarianceComponents, variance_components

# The standard error of a coverage is half a percent.
STUDIES = 2_000
DRAWS = [3, 5, 10]


def covered(intervals: list[Interval | None], truth: float) -> float:
    assert None not in intervals
    return float(np.mean([one is not None and one.low <= truth <= one.high for one in intervals]))


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


@pytest.mark.parametrize("draws", DRAWS)
def test_the_t_interval_covers_the_mean(draws: int) -> None:
    values = generator(1, draws).normal(7, 2, (STUDIES, draws))
    assert 0.935 <= covered([describe(study).interval for study in values], 7) <= 0.965


def test_of_five_draws_the_t_interval_covers_the_difference_and_the_bootstrap_does_not() -> None:
    rng = generator(2)
    sets = rng.standard_normal((STUDIES, 5))
    found = [paired_difference(study + 0.3 + 0.1 * rng.standard_normal(5), study, rng, resamples=500) for study in sets]
    assert 0.935 <= covered([one.interval for one in found], 0.3) <= 0.965
    assert 0.80 <= covered([one.bootstrap for one in found], 0.3) <= 0.88


@pytest.mark.parametrize("draws", [2, 3, 5])
def test_equal_sources_of_shares_of_fifty_items_are_seldom_told_apart(draws: int) -> None:
    """Many of their draws are equal by chance, without spread."""
    rng = generator(11, draws)
    shares = np.round(50 * rng.normal(0.5, 0.03, (500, 5, draws))) / 50
    found = [
        compare_sources(
            {str(number): own for number, own in enumerate(study)},
            lambda *_: generator(0),
            higher_is_better=True,
            paired=False,
            resamples=10,
        )
        for study in shares
    ]
    assert np.mean([any(one.told_apart for one in pairs) for pairs in found]) <= 0.05


def components(rng: np.random.Generator, sizes: list[int], source_variance: float) -> list[VarianceComponents]:
    found = []
    for _ in range(STUDIES):
        means = np.sqrt(source_variance) * rng.standard_normal(len(sizes))
        one = variance_components([mean + rng.standard_normal(size) for mean, size in zip(means, sizes, strict=True)])
        assert one is not None
        found.append(one)
    return found


@pytest.mark.parametrize(("draws", "source_variance"), [(3, 1.0), (5, 0.25), (10, 4.0)])
def test_intervals_of_variance_components_cover(draws: int, source_variance: float) -> None:
    found = components(generator(3, draws, int(4 * source_variance)), [draws] * 5, source_variance)
    assert all(one.balanced for one in found)
    assert 0.935 <= covered([one.draw_interval for one in found], 1) <= 0.965
    share = source_variance / (source_variance + 1)
    assert 0.935 <= covered([one.share_interval for one in found], share) <= 0.965
    assert 0.935 <= covered([one.source_interval for one in found], source_variance) <= 0.985
    assert np.mean([one.draw_variance for one in found]) == pytest.approx(1, rel=0.05)


def test_intervals_of_unbalanced_variance_components_cover() -> None:
    found = components(generator(4), [2, 3, 5, 6, 9], 1.0)
    assert not any(one.balanced for one in found)
    assert 0.935 <= covered([one.draw_interval for one in found], 1) <= 0.965
    assert 0.93 <= covered([one.share_interval for one in found], 0.5) <= 0.97
    assert np.mean([one.draw_variance for one in found]) == pytest.approx(1, rel=0.05)


def test_the_estimate_of_the_source_variance_is_right_on_average() -> None:
    """With a large true variance next to none is truncated at 0, in even and uneven studies."""
    for number, sizes in enumerate(([5] * 5, [2, 3, 5, 6, 9])):
        found = components(generator(5, number), sizes, 9.0)
        error = 9 * np.sqrt(2 / 4 / STUDIES)
        assert np.mean([one.source_variance for one in found]) == pytest.approx(9, abs=4 * error)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("difference", [0.7, 1.5])
def test_the_draws_needed_give_the_power(difference: float, paired: bool) -> None:
    draws = draws_needed(difference, 1, paired=paired)
    assert draws is not None
    rng = generator(6, draws, paired)
    a = rng.normal(difference, 1, (20_000, draws))
    if paired:
        p_values = stats.ttest_1samp(a, 0, axis=1).pvalue
    else:
        p_values = stats.ttest_ind(a, rng.standard_normal((20_000, draws)), axis=1).pvalue
    power = float((p_values < 0.05).mean())
    assert power == pytest.approx(power_of_t_test(draws, difference, 1, paired=paired), abs=0.012)
    assert 0.79 <= power <= 0.88


def test_of_sources_of_one_mean_any_is_told_apart_in_a_twentieth_of_studies() -> None:
    rng = generator(7)
    false = 0
    for _ in range(500):
        values = {str(i): rng.normal(0, spread, 5) for i, spread in enumerate((0.2, 0.6, 1, 2))}
        found = compare_sources(values, lambda *_: rng, higher_is_better=True, paired=False, resamples=5)
        false += any(one.told_apart for one in found)
    assert false / 500 <= 0.06


@pytest.mark.parametrize("paired", [False, True])
def test_simultaneous_intervals_cover_all_differences_together(paired: bool) -> None:
    rng = generator(8, paired)
    means = np.array([0.0, 1.0, 2.0, 4.0])
    pairs = [(i, j) for i in range(4) for j in range(i)]
    together = 0
    for _ in range(600):
        common = 3 * rng.standard_normal(5) if paired else 0
        groups = list(means[:, None] + rng.standard_normal((4, 5)) * [[0.5], [1], [1], [2]] + common)
        found = simultaneous_intervals(groups, pairs, rng, paired=paired, resamples=400)
        assert found is not None
        together += all(one.low <= means[i] - means[j] <= one.high for one, (i, j) in zip(found, pairs, strict=True))
    assert 0.92 <= together / 600 <= 0.975


def test_of_two_equal_sources_of_ten_draws_one_is_seldom_called_better() -> None:
    rng = generator(9)
    verdicts = [
        probability_of_improvement(
            *rng.standard_normal((2, 10)), rng, higher_is_better=True, paired=False, resamples=400
        )
        for _ in range(600)
    ]
    assert np.mean([one.verdict != "no evidence" for one in verdicts]) <= 0.06


def test_the_zero_control_is_zero_and_sees_what_is_not() -> None:
    rng = generator(10)
    for value in rng.standard_normal(1_000):
        control = zero_control(np.full(15, value))
        assert control is not None
        assert control.passes
        assert control.largest_difference == 0
        touched = np.full(15, value)
        touched[rng.integers(15)] = np.nextafter(value, 9)
        seen = zero_control(touched)
        assert seen is not None
        assert not seen.passes
