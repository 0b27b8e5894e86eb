"""Statistics of studies against closed forms, scipy and numbers worked out by hand, and what must not change them."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from calibrant.errors import CalibrantError
from calibrant.randomness import make_rng
from calibrant.study.statistics.comparisons import compare_sources
from calibrant.study.statistics.controls import implementation_noise, zero_control
from calibrant.study.statistics.describe import describe
from calibrant.study.statistics.draws_needed import draws_needed, power_of_t_test
from calibrant.study.statistics.holm import holm
from calibrant.study.statistics.improvement import probability_of_improvement
from calibrant.study.statistics.paired_difference import paired_difference
from calibrant.study.statistics.rank_stability import rank_stability
from calibrant.study.statistics.simultaneous import simultaneous_intervals
from calibrant.study.statistics.variance_components import variance_components

numbers = st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda x: round(x, 3))


def samples(least: int = 2, most: int = 8):
    return st.integers(least, most).flatmap(lambda n: arrays(np.float64, n, elements=numbers))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def named_rng(*names: str) -> np.random.Generator:
    return make_rng(0, *names)


def test_a_description_by_hand() -> None:
    found = describe(np.array([1.0, 2.0, 3.0, 6.0]))
    assert (found.n, found.mean, found.minimum, found.maximum, found.range) == (4, 3, 1, 6, 5)
    assert found.sd == pytest.approx(math.sqrt(14 / 3))
    assert found.interval is not None
    low, high = stats.t.interval(0.95, 3, 3, math.sqrt(14 / 12))
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high))


def test_one_draw_has_no_spread_and_equal_draws_have_none() -> None:
    one = describe(np.array([0.1]))
    assert (one.n, one.mean, one.sd, one.interval, one.range) == (1, 0.1, None, None, 0)
    equal = describe(np.full(7, 0.1))
    assert equal.interval is not None
    assert (equal.mean, equal.sd, equal.interval.low, equal.interval.high) == (0.1, 0, 0.1, 0.1)
    with pytest.raises(CalibrantError, match="no draws"):
        describe(np.array([]))


@settings(deadline=None)
@given(samples(), st.floats(0.01, 100), st.floats(-1e4, 1e4))
def test_a_description_moves_with_shift_and_scale(values: np.ndarray, scale: float, shift: float) -> None:
    before, after = describe(values), describe(scale * values + shift)
    size = scale * np.abs(values).max() + abs(shift) + 1
    assert before.sd is not None
    assert after.mean == pytest.approx(scale * before.mean + shift, abs=1e-9 * size)
    assert after.sd == pytest.approx(scale * before.sd, abs=1e-9 * size)
    assert after.range == pytest.approx(scale * before.range, abs=1e-9 * size)


def test_paired_differences_by_hand_and_scipy() -> None:
    first, second = np.array([3.0, 5.0, 4.0, 8.0, 7.0]), np.array([1.0, 4.0, 4.0, 5.0, 3.0])
    found = paired_difference(first, second, rng())
    assert found.differences == (2, 1, 0, 3, 4)
    assert (found.n, found.mean) == (5, 2)
    assert found.sd == pytest.approx(math.sqrt(2.5))
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(expected))
    # All 3,125 resamples.
    means = np.array([np.mean(draw) for draw in np.stack(np.meshgrid(*[first - second] * 5)).reshape(5, -1).T])
    assert found.bootstrap is not None
    assert (found.bootstrap.low, found.bootstrap.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.1)


def test_paired_differences_of_one_draw_and_of_none() -> None:
    found = paired_difference(np.array([3.0]), np.array([1.0]), rng())
    assert (found.mean, found.sd, found.interval, found.bootstrap) == (2, None, None, None)
    for first, second in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(CalibrantError, match="are no pairs"):
            paired_difference(np.array(first), np.array(second), rng())


@pytest.mark.parametrize(("first", "second", "paired", "expected"), [
    ([1, 2, 3], [1, 2, 3], False, 0.5),
    ([2, 2, 5], [1, 2, 3], False, (1.5 + 1.5 + 3) / 9),
    ([2, 2, 5], [1, 2, 3], True, 2.5 / 3),
    ([4, 5], [1, 2, 3], False, 1.0),
    ([0, 0], [0, 0], True, 0.5),
])  # fmt: skip
def test_p_a_better_than_b_by_hand(first, second, paired: bool, expected: float) -> None:
    a, b = np.array(first, dtype=float), np.array(second, dtype=float)
    found = probability_of_improvement(a, b, rng(), higher_is_better=True, paired=paired)
    assert found.probability == pytest.approx(expected)
    turned = probability_of_improvement(a, b, rng(), higher_is_better=False, paired=paired)
    assert turned.probability == pytest.approx(1 - expected)


@settings(deadline=None, max_examples=50)
@given(samples(1), samples(1), st.booleans(), st.booleans())
def test_p_a_better_than_b_and_p_b_better_than_a_are_1(
    a: np.ndarray, b: np.ndarray, higher: bool, paired: bool
) -> None:
    if paired:
        size = min(len(a), len(b))
        a, b = a[:size], b[:size]
    one, other = (
        probability_of_improvement(*both, rng(), higher_is_better=higher, paired=paired, resamples=50)
        for both in ((a, b), (b, a))
    )
    assert one.probability + other.probability == pytest.approx(1)
    if one.interval is not None:
        assert 0 <= one.interval.low <= one.interval.high <= 1
    if not paired:
        expected = stats.mannwhitneyu(a, b).statistic / (len(a) * len(b))
        assert one.probability == pytest.approx(expected if higher else 1 - expected)


@settings(deadline=None, max_examples=50)
@given(samples(2), samples(2), st.sampled_from([0.25, 2.0, 1024.0]), st.randoms())
def test_p_a_better_than_b_knows_only_the_order(a: np.ndarray, b: np.ndarray, scale: float, random) -> None:
    def probability(first: np.ndarray, second: np.ndarray) -> float:
        found = probability_of_improvement(first, second, rng(), higher_is_better=True, paired=False, resamples=10)
        return found.probability

    shuffled = np.array(random.sample(list(a), len(a)))
    assert probability(a, b) == probability(scale * a, scale * b) == pytest.approx(probability(shuffled, b))


@pytest.mark.parametrize(("wins", "verdict"), [
    (5, "no evidence"), (6, "no evidence"), (14, "no evidence"), (15, "better"), (20, "better"),
])  # fmt: skip
def test_verdicts_of_twenty_pairs(wins: int, verdict: str) -> None:
    """14 of 20 (0.7) reach down to 0.5; 15 of 20 (0.75) do not."""
    a = np.array([1.0] * wins + [-1.0] * (20 - wins))
    found = probability_of_improvement(a, np.zeros(20), rng(), higher_is_better=True, paired=True)
    assert found.verdict == verdict


def test_an_improvement_may_be_detectable_and_too_small() -> None:
    a = np.array([1.0] * 70 + [-1.0] * 30)
    found = probability_of_improvement(a, np.zeros(100), rng(), higher_is_better=True, paired=True)
    assert found.verdict == "detectable, too small to matter"
    assert found.interval is not None
    binomial = stats.binom.ppf([0.025, 0.975], 100, 0.7) / 100
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(binomial), abs=0.011)


def test_one_draw_is_no_evidence() -> None:
    found = probability_of_improvement(np.array([9.0]), np.zeros(5), rng(), higher_is_better=True, paired=False)
    assert (found.probability, found.interval, found.verdict) == (1, None, "no evidence")


GROUPS = [np.array([3.0, 5.0, 4.0]), np.array([8.0, 9.0, 7.0]), np.array([1.0, 0.0, 2.0])]


def test_variance_components_by_hand() -> None:
    """Means 4, 8, 1 with variance 1 in each: MS_w = 1, MS_b = 3 * 37 / 3 = 37."""
    found = variance_components(GROUPS)
    assert found is not None
    assert (found.sources, found.draws, found.balanced) == (3, 9, True)
    assert found.draw_variance == pytest.approx(1)
    assert found.source_variance == pytest.approx(12)
    assert found.share == pytest.approx(12 / 13)
    assert (found.draw_interval.low, found.draw_interval.high) == pytest.approx(
        (6 / stats.chi2.ppf(0.975, 6), 6 / stats.chi2.ppf(0.025, 6))
    )
    ends = [37 / stats.f.ppf(q, 2, 6) for q in (0.975, 0.025)]
    assert found.share_interval is not None
    assert (found.share_interval.low, found.share_interval.high) == pytest.approx(
        tuple((end - 1) / (end - 1 + 3) for end in ends)
    )
    williams = [2 * (37 - stats.f.ppf(q, 2, 6)) / (3 * stats.chi2.ppf(q, 2)) for q in (0.975, 0.025)]
    assert (found.source_interval.low, found.source_interval.high) == pytest.approx(tuple(williams))


def test_variance_components_of_unequal_numbers_of_draws_by_hand() -> None:
    groups = [np.array([1.0, 3.0]), np.array([5.0, 7.0, 6.0, 6.0])]
    found = variance_components(groups)
    assert found is not None
    assert not found.balanced
    f, within = stats.f_oneway(*groups).statistic, (2 + 2) / 4
    n0 = 6 - (4 + 16) / 6
    assert found.draw_variance == pytest.approx(within)
    assert found.source_variance == pytest.approx((f * within - within) / n0)


def test_components_that_would_be_negative_are_zero() -> None:
    found = variance_components([np.array([0.0, 10.0]), np.array([10.0, 0.0]), np.array([5.0, 5.0])])
    assert found is not None
    assert (found.source_variance, found.share) == (0, 0)
    assert found.share_interval is not None
    assert found.share_interval.low == found.source_interval.low == 0


def test_components_of_what_does_not_vary() -> None:
    same = variance_components([np.full(3, 0.1), np.full(4, 0.1)])
    assert same is not None
    assert (same.source_variance, same.draw_variance, same.share, same.share_interval) == (0, 0, None, None)
    exact = variance_components([np.full(3, 0.1), np.full(3, 0.3)])
    assert exact is not None
    assert exact.source_variance > 0
    assert (exact.draw_variance, exact.share, exact.share_interval) == (0, None, None)
    assert variance_components([np.array([1.0, 2.0])]) is None
    assert variance_components([np.array([1.0]), np.array([2.0])]) is None
    assert variance_components([]) is None


@settings(deadline=None, max_examples=100)
@given(st.lists(samples(1, 6), min_size=2, max_size=5), st.floats(0.1, 10), st.floats(-100, 100), st.randoms())
def test_the_share_does_not_move_with_shift_scale_and_order(groups, scale: float, shift: float, random) -> None:
    found = variance_components(groups)
    assume(found is not None and found.share is not None and found.share > 0)
    assert found is not None
    spread = np.ptp(np.concatenate(groups))
    assume(spread > 1e-3 * np.abs(np.concatenate(groups)).max())
    moved = [scale * np.array(random.sample(list(group), len(group))) + shift * spread for group in groups]
    again = variance_components(random.sample(moved, len(moved)))
    assert again is not None
    assert again.share == pytest.approx(found.share, abs=1e-6)
    assert again.share_interval is not None
    assert found.share_interval is not None
    assert again.share_interval.low == pytest.approx(found.share_interval.low, abs=1e-6)
    assert again.share_interval.high == pytest.approx(found.share_interval.high, abs=1e-6)
    assert 0 <= found.share_interval.low <= found.share_interval.high <= 1
    assert found.source_interval.low <= found.source_interval.high


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.999))
def test_holm_rejects_what_its_procedure_rejects(p_values: list[float], alpha: float) -> None:
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected = set()
    for step, index in enumerate(order):
        if p_values[index] * (len(p_values) - step) >= alpha:
            break
        rejected.add(index)
    assert {index for index, p in enumerate(holm(p_values)) if p < alpha} == rejected


def test_comparisons_are_scipys_tests() -> None:
    values = {name: rng().normal(0, 1, 5) * (i + 1) + i for i, name in enumerate("abc")}
    values["b"] = values["b"][::-1].copy()
    for paired in (False, True):
        for one in compare_sources(values, named_rng, higher_is_better=True, paired=paired):
            first, second = values[one.better], values[one.worse]
            test = stats.ttest_rel(first, second) if paired else stats.ttest_ind(first, second, equal_var=False)
            assert one.difference == pytest.approx(first.mean() - second.mean())
            assert one.difference >= 0
            assert one.p_value == pytest.approx(test.pvalue)
            assert one.interval is not None
            assert (one.interval.low, one.interval.high) == pytest.approx(tuple(test.confidence_interval(0.95)))


def test_comparisons_put_the_better_source_first() -> None:
    values = {"low": np.array([1.0, 1.1, 0.9, 1.0, 1.05]), "high": np.array([5.0, 5.1, 4.9, 5.2, 5.0])}
    for higher, better in ((True, "high"), (False, "low")):
        (found,) = compare_sources(values, named_rng, higher_is_better=higher, paired=False)
        assert found.better == better
        assert found.told_apart
        assert found.improvement.probability == 1
        assert found.simultaneous is not None
        ends = (found.simultaneous.low, found.simultaneous.high)
        assert min(ends) > 0 if higher else max(ends) < 0


def test_comparisons_do_not_depend_on_the_order_of_names() -> None:
    values = {name: np.random.default_rng(ord(name)).normal(size=6) for name in "abcd"}
    turned = dict(reversed(list(values.items())))
    for paired in (False, True):
        assert compare_sources(values, named_rng, higher_is_better=True, paired=paired) == compare_sources(
            turned, named_rng, higher_is_better=True, paired=paired
        )


def test_a_pair_of_sources_does_not_depend_on_the_others() -> None:
    values = {name: np.random.default_rng(ord(name)).normal(size=6) for name in "abcd"}
    all_pairs = compare_sources(values, named_rng, higher_is_better=True, paired=False)
    for one in all_pairs:
        pair = {name: values[name] for name in (one.better, one.worse)}
        (alone,) = compare_sources(pair, named_rng, higher_is_better=True, paired=False)
        assert (alone.interval, alone.improvement) == (one.interval, one.improvement)


def test_comparisons_of_single_draws_and_of_equal_values() -> None:
    one, same, other = np.array([1.0]), np.full(5, 2.0), np.full(5, 3.0)
    found = compare_sources({"one": one, "same": same, "too": same}, named_rng, higher_is_better=False, paired=False)
    tested = {(each.better, each.worse): each for each in found}
    assert tested["one", "same"].p_value is None
    assert not tested["one", "same"].told_apart
    assert tested["same", "too"].p_value is None
    for paired in (False, True):
        (differs,) = compare_sources({"same": same, "other": other}, named_rng, higher_is_better=False, paired=paired)
        assert (differs.p_value, differs.interval, differs.told_apart) == (None, None, False)
    with pytest.raises(CalibrantError, match="the same draws"):
        compare_sources({"one": one, "same": same}, named_rng, higher_is_better=False, paired=True)


def test_simultaneous_intervals_are_wider_than_single_ones_and_need_five_draws() -> None:
    groups = [np.random.default_rng(i).normal(size=6) for i in range(5)]
    pairs = [(i, j) for i in range(5) for j in range(i)]
    for paired in (False, True):
        all_pairs = simultaneous_intervals(groups, pairs, rng(), paired=paired)
        alone = simultaneous_intervals(groups, pairs[:1], rng(), paired=paired)
        assert all_pairs is not None
        assert alone is not None
        assert all_pairs[0].low < alone[0].low < alone[0].high < all_pairs[0].high
        middle = (alone[0].low + alone[0].high) / 2
        assert middle == pytest.approx(groups[1].mean() - groups[0].mean())
        assert simultaneous_intervals([group[:4] for group in groups], pairs, rng(), paired=paired) is None


def test_rank_stability_by_hand() -> None:
    """Rankings abc, abc, bac: tau 1, 1/3, 1/3; the same best in one of three pairs."""
    values = np.array([[1.0, 1.0, 2.0], [2.0, 2.0, 1.0], [3.0, 3.0, 3.0]])
    found = rank_stability(values, higher_is_better=False)
    assert found is not None
    assert (found.sources, found.draws) == (3, 3)
    assert found.tau == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert found.same_best == pytest.approx(1 / 3)
    turned = rank_stability(values, higher_is_better=True)
    assert turned is not None
    assert (turned.tau, turned.same_best) == (pytest.approx(found.tau), 1)


def test_rank_stability_of_ties_and_of_too_little() -> None:
    tied = rank_stability(np.ones((3, 4)), higher_is_better=True)
    assert tied is not None
    assert (tied.tau, tied.same_best) == (None, 1)
    half = rank_stability(np.array([[1.0, 1.0], [1.0, 0.0]]), higher_is_better=True)
    assert half is not None
    assert (half.tau, half.same_best) == (None, 0.5)
    assert rank_stability(np.ones((1, 4)), higher_is_better=True) is None
    assert rank_stability(np.ones((4, 1)), higher_is_better=True) is None


@pytest.mark.parametrize(("difference", "sd", "paired", "draws"), [
    (0.5, 1.0, False, 64), (0.8, 1.0, False, 26), (0.2, 1.0, False, 394),  # Cohen 1988, table 2.4.1
    (0.5, 1.0, True, 34), (-5.0, 10.0, True, 34), (100.0, 1.0, False, 2),
])  # fmt: skip
def test_draws_needed_are_those_of_the_tables(difference: float, sd: float, paired: bool, draws: int) -> None:
    assert draws_needed(difference, sd, paired=paired) == draws


@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 1e6), st.booleans())
def test_draws_needed_are_the_fewest(difference: float, paired: bool) -> None:
    draws = draws_needed(difference, 1, paired=paired)
    assert draws is not None
    assert power_of_t_test(draws, difference, 1, paired=paired) >= 0.8
    assert draws == 2 or power_of_t_test(draws - 1, difference, 1, paired=paired) < 0.8


def test_draws_needed_where_nothing_is_to_be_seen() -> None:
    assert draws_needed(0, 1, paired=False) is None
    assert draws_needed(1e-9, 1, paired=False) is None
    assert draws_needed(0.1, 0, paired=True) is None


def test_controls() -> None:
    assert zero_control(np.array([0.1])) is None
    assert implementation_noise([]) is None
    passed = zero_control(np.full(9, 0.1))
    assert passed is not None
    assert (passed.values, passed.largest_difference, passed.passes) == (9, 0, True)
    failed = zero_control(np.array([0.1, 0.1, 0.1 + 2**-55]))
    assert failed is not None
    assert not failed.passes
    noise = implementation_noise([(1.0, 1.0), (2.0, 1.5)])
    assert noise is not None
    assert (noise.values, noise.largest_difference, noise.passes) == (2, 0.5, False)
