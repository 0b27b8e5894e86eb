"""Which source to take: over simulated studies the wrong one is seldom recommended, and cells go to what is open."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from calibrant.errors import CalibrantError
from calibrant.study.halving import Recommendation, recommend


def simulated(seed: int, means: list[float], sd: float | list[float] = 1.0, common: float = 0.0) -> Callable:
    """Normal scores of sources "0", "1", ...; ``common`` is the spread of what all sources share in a draw."""
    rng = np.random.default_rng(seed)
    values = np.array(means)[:, None] + np.reshape(sd, (-1, 1)) * rng.standard_normal((len(means), 400))
    values += common * rng.standard_normal(400)
    return lambda source, draw: float(values[int(source), draw])


def all_of(score_of: Callable) -> Callable:
    return lambda asked: [score_of(source, draw) for source, draw in asked]


def search(score_of: Callable, count: int, **options) -> Recommendation:
    names = [str(i) for i in range(count)]
    return recommend(names, all_of(score_of), **{"higher_is_better": False, "budget": 200, **options})


@pytest.mark.parametrize(("means", "sd"), [
    ([0.0, 0.3, 0.3, 0.3], 1.0),
    ([0.0, 1.0, 2.0, 0.2, 4.0], [0.3, 1.0, 2.0, 0.3, 0.1]),
    ([0.0, 1.5, 1.5], 1.0),
])  # fmt: skip
def test_the_wrong_source_is_recommended_in_at_most_a_twentieth_of_cases(means: list[float], sd) -> None:
    found = [search(simulated(seed, means, sd), len(means)) for seed in range(500)]
    assert sum(one.recommended not in (None, "0") for one in found) <= 25
    assert sum("0" not in one.alike for one in found) <= 25
    assert all(one.cells <= 200 for one in found)


def test_of_equal_sources_none_is_recommended_in_nineteen_of_twenty_cases() -> None:
    found = [search(simulated(seed, [0.0] * 4, [0.2, 1, 1, 2]), 4) for seed in range(500)]
    assert sum(one.recommended is not None for one in found) <= 25
    assert sum(len(one.alike) < 4 for one in found) <= 25


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_clear_differences_are_found_with_few_cells(higher_is_better: bool) -> None:
    sign = -1 if higher_is_better else 1
    means = [sign * mean for mean in (0.0, 30.0, 30.0, 4.0)]
    found = [search(simulated(s, means), 4, higher_is_better=higher_is_better) for s in range(100)]
    assert sum(one.recommended == "0" for one in found) >= 95
    assert np.mean([one.cells for one in found]) < 45
    one = found[0]
    assert one.sentence == f"Take 0: every other source is worse ({one.cells} cells)."
    assert {gone.source for gone in one.dropped} == {"1", "2", "3"}
    for gone in one.dropped:
        assert gone.interval is not None
        assert gone.interval.low > 0 if not higher_is_better else gone.interval.high < 0
        assert len(one.scores[gone.source]) == gone.draws


def test_what_draws_share_does_not_blur_the_difference() -> None:
    found = [search(simulated(seed, [0.0, 1.0], 0.2, common=50), 2) for seed in range(50)]
    assert all(one.recommended == "0" for one in found)


def test_the_budget_ends_a_search_and_what_is_still_possible_is_said() -> None:
    found = search(simulated(0, [0.0, 0.01, 30.0]), 3, budget=60)
    assert (found.recommended, found.ended) == (None, "budget")
    assert sorted(found.alike) == ["0", "1"]
    assert 58 < found.cells <= 60
    draws = len(found.scores["0"])
    (other,) = found.against_best
    assert other.interval is not None
    assert found.sentence == (
        f"{found.alike[0]} and {found.alike[1]} cannot be told apart with {draws} draws: the budget is used up, and "
        f"differences of up to {max(-other.interval.low, other.interval.high):.2g} are still possible "
        f"({found.cells} cells)."
    )
    assert (other.best, other.source, other.draws) == (*found.alike, draws)


def test_differences_too_small_to_matter_end_a_search() -> None:
    found = search(simulated(0, [0.0, 0.0, 30.0], 0.1), 3, smallest_difference=1.0)
    assert (found.recommended, found.ended, sorted(found.alike)) == (None, "too small to matter", ["0", "1"])
    assert found.cells < 60
    assert "too small to matter: any will do" in found.sentence
    same = search(lambda source, draw: 0.1, 3)
    assert (same.ended, same.cells, len(same.alike)) == ("too small to matter", 9, 3)


def test_any_will_do_is_said_of_all_that_are_left() -> None:
    """Not only of the best and each of the others: the other two may lie on both sides of it."""
    values = {"a": [0.0, 0.0, 0.0], "b": [-0.1, 0.1, 0.4], "c": [0.5, 0.3, 0.0]}
    options = {"higher_is_better": False, "budget": 9}
    found = recommend(list(values), all_of(lambda source, draw: values[source][draw]), **options)
    of_best = max(max(-one.interval.low, one.interval.high) for one in found.against_best if one.interval)
    assert found.possible is not None
    assert found.possible > of_best
    between = recommend(
        list(values),
        all_of(lambda source, draw: values[source][draw]),
        smallest_difference=(of_best + found.possible) / 2,
        **options,
    )
    assert between.ended == "budget"


def test_shares_of_few_items_that_are_the_same_in_every_draw_are_no_proof() -> None:
    found = search(lambda source, draw: {"0": 0.5, "1": 0.48}[source], 2, higher_is_better=True, budget=6)
    assert (found.recommended, found.alike, found.possible, found.failed) == (None, ("0", "1"), None, ())
    assert found.sentence.endswith("differences of any size are still possible (6 cells).")


def test_a_source_that_fails_is_dropped() -> None:
    score_of = simulated(0, [0.0, 9.0, 9.0])
    found = search(lambda source, draw: math.nan if (source, draw) == ("0", 1) else score_of(source, draw), 3)
    assert "0" not in found.alike
    assert (found.dropped[0].source, found.dropped[0].interval) == ("0", None)
    assert found.sentence.endswith("0 failed and is not compared.")
    ranked = simulated(0, [0.0, 0.0, 9.0])
    worse = search(lambda source, draw: math.nan if source == "0" else ranked(source, draw), 3)
    assert (worse.recommended, worse.failed) == ("1", ("0",))
    assert worse.sentence.startswith("Take 1: every other source that ran is worse (")


def test_what_is_left_of_failures_is_not_recommended() -> None:
    left = search(lambda source, draw: 0.1 if source == "2" else math.nan, 3)
    assert (left.recommended, left.alike, left.ended, left.failed) == (None, ("2",), "one is left", ("0", "1"))
    assert left.sentence == (
        "Nothing can be recommended: 2 has nothing to be compared with (9 cells). 0 and 1 failed and are not compared."
    )
    nothing = search(lambda source, draw: math.inf, 2)
    assert (nothing.recommended, nothing.alike) == (None, ())
    assert nothing.sentence.startswith("No source can be recommended")


def test_one_source_needs_no_cell() -> None:
    found = search(lambda source, draw: pytest.fail("was asked"), 1)
    assert (found.recommended, found.cells) == ("0", 0)


def test_the_order_of_sources_does_not_matter() -> None:
    score_of = simulated(3, [0.0, 0.5, 1.0])
    one, other = (
        recommend(names, all_of(score_of), higher_is_better=False, budget=90)
        for names in (["0", "1", "2"], ["2", "0", "1"])
    )
    assert (one.alike, one.cells, one.recommended) == (other.alike, other.cells, other.recommended)


@pytest.mark.parametrize(("sources", "budget", "said"), [
    ([], 9, "at least one"), (["a", "a"], 9, "once"), (["a", "b"], 5, "use a `budget` of 6 or more"),
])  # fmt: skip
def test_searches_that_cannot_begin(sources: list[str], budget: int, said: str) -> None:
    with pytest.raises(CalibrantError, match=said):
        recommend(sources, all_of(lambda source, draw: 0.0), higher_is_better=False, budget=budget)


def test_the_search_ends_with_the_draws() -> None:
    found = search(simulated(0, [0.0, 0.01]), 2, most_draws=5)
    assert [len(own) for own in found.scores.values()] == [5, 5]
    assert found.ended == "draws"
    assert "the draws are used up" in found.sentence
