"""The analysis of whole tables: what it finds, and that it is honest where scores are few, missing or equal."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrant.errors import CalibrantError
from calibrant.study.analysis import analyse
from calibrant.study.scores import Score

LOWER = {"kl": False, "seconds": False}


def score(source: str, draw: int, value: float, **other) -> Score:
    cell = Score("m", "gptq-w4a16", source, draw, 128, 512, 0, 0, "kl", "wiki", value)
    return replace(cell, **other)


def table(values: dict[str, list[float]], **other) -> list[Score]:
    return [score(source, draw, value, **other) for source, own in values.items() for draw, value in enumerate(own)]


CLEAR = {
    "c4": [0.10, 0.11, 0.10, 0.12, 0.11],
    "self": [0.11, 0.10, 0.12, 0.115, 0.105],
    "vocabulary": [0.31, 0.30, 0.33, 0.32, 0.30],
}


def numbers_of(value) -> list[float]:
    if isinstance(value, dict | list | tuple):
        return [
            number for inner in (value.values() if isinstance(value, dict) else value) for number in numbers_of(inner)
        ]
    return [value] if isinstance(value, float) else []


def checked(found):
    """The analysis, if it can be written as JSON and holds no NaN and no infinity."""
    json.dumps(found.as_json(), allow_nan=False)
    assert all(map(math.isfinite, numbers_of(found.as_json())))
    return found


def test_a_clear_table() -> None:
    (found,) = checked(analyse(table(CLEAR), LOWER, left_out=["vocabulary"])).settings
    assert [one.source for one in found.sources] == ["c4", "self", "vocabulary"]
    assert found.components.share > 0.9
    assert found.components_without.sources == ("vocabulary",)
    assert found.components_without.components.share == 0
    apart = {(one.better, one.worse): one.told_apart for one in found.comparisons}
    assert sum(apart.values()) == 2
    assert all(told == ("vocabulary" in pair) for pair, told in apart.items())
    assert found.rank_stability.draws == 5
    assert found.best_two.draws > 10
    assert found.missing == found.unusable == ()
    assert found.zero_control is found.implementation_noise is None
    share = found.components.share_interval
    assert found.headline == (
        f"The source explains {100 * found.components.share:.0f} % of the variance of KL on wiki under gptq-w4a16 "
        f"(95 % interval {100 * share.low:.0f} to {100 * share.high:.0f} %); "
        "c4 and self cannot be told apart with 5 draws."
    )


def test_the_direction_of_the_measure_decides_the_best() -> None:
    accuracy = [replace(one, measure="accuracy", on="piqa") for one in table(CLEAR)]
    (found,) = checked(analyse(accuracy, {"accuracy": True})).settings
    assert found.sources[0].source == "vocabulary"
    assert found.headline.endswith("vocabulary is better than every other source.")
    with pytest.raises(CalibrantError, match="higher is better for accuracy"):
        analyse(accuracy, LOWER)


def test_more_than_two_alike_are_listed() -> None:
    values = {name: CLEAR["c4"] if name != "b" else CLEAR["self"] for name in "abc"}
    (found,) = analyse(table(values), LOWER).settings
    assert "cannot be told apart from" in found.headline
    assert found.headline.endswith("the best, with 5 draws.")


def test_one_draw_of_each_source_decides_nothing() -> None:
    (found,) = checked(analyse(table({"c4": [0.1], "self": [0.2]}), LOWER)).settings
    assert found.components is found.rank_stability is found.best_two is None
    assert not found.comparisons[0].told_apart
    assert found.sources[0].description.sd is None
    assert found.headline == (
        "c4 has the best mean of KL on wiki under gptq-w4a16 (0.1), but no source has two draws, so that no "
        "difference can be told from chance."
    )


@pytest.mark.parametrize(("values", "said"), [([0.1, 0.2], "no other source to compare"), ([0.1], "from one draw")])
def test_one_source_has_nothing_to_be_compared_with(values: list[float], said: str) -> None:
    (found,) = checked(analyse(table({"c4": values}), LOWER)).settings
    assert found.components is None
    assert found.comparisons == ()
    assert said in found.headline


def test_values_that_are_all_equal() -> None:
    (found,) = checked(analyse(table({"c4": [0.1] * 3, "self": [0.1] * 3}), LOWER)).settings
    assert found.components.share is None
    assert found.best_two.draws is None
    assert not found.comparisons[0].told_apart
    assert found.headline == "KL on wiki under gptq-w4a16 is 0.1 with every source and draw."


def test_sources_without_spread_that_differ() -> None:
    (found,) = checked(analyse(table({"c4": [0.1] * 3, "self": [0.2] * 3}), LOWER)).settings
    assert (found.components.share, found.best_two.draws) == (None, None)
    said = "no two draws of a source differ in KL on wiki under gptq-w4a16, so that nothing says how much is chance."
    assert found.headline == said


def test_a_source_of_one_draw_beside_others_is_not_called_alike() -> None:
    """Such as text that a model writes greedily: all its sets are the same."""
    clear = {**CLEAR, "greedy": [0.9]}
    (found,) = checked(analyse(table(clear), LOWER)).settings
    said = "c4 and self cannot be told apart with 5 draws; greedy is not tested for want of a second draw"
    assert f"{said} or of spread; 4 of 20 cells are missing" in found.headline
    (sure,) = checked(analyse(table({"a": [0.1, 0.2, 0.1], "b": [3.1, 3.2, 3.0], "greedy": [9.0]}), LOWER)).settings
    assert "a is better than every other source that is tested; greedy is not tested" in sure.headline


def test_missing_cells_are_named_and_unequal_draws_are_said() -> None:
    cells = [one for one in table(CLEAR) if (one.source, one.draw) not in (("self", 1), ("self", 3))]
    (found,) = checked(analyse(cells, LOWER)).settings
    assert found.missing == (("self", 0, 1), ("self", 0, 3))
    assert not found.components.balanced
    assert found.rank_stability.draws == 3
    assert found.headline.endswith("cannot be told apart with 3 to 5 draws; 2 of 15 cells are missing.")


def test_scores_that_are_not_finite_are_left_out_and_counted() -> None:
    broken = [*table(CLEAR), score("c4", 5, math.nan), score("self", 5, math.inf), score("vocabulary", 5, 0.3)]
    (found,) = checked(analyse(broken, LOWER)).settings
    assert found.unusable == (("c4", 0, 5), ("self", 0, 5))
    assert found.missing == ()
    assert found.headline.endswith("; 2 scores are not finite and left out.")
    (nothing,) = checked(analyse([score("c4", 0, math.nan)], LOWER)).settings
    assert nothing.headline == (
        "There is no usable score of KL on wiki under gptq-w4a16; 1 score is not finite and left out."
    )


def test_sets_of_several_seeds_are_draws() -> None:
    (found,) = analyse(table(CLEAR) + table(CLEAR, seed=1), LOWER).settings
    assert [one.description.n for one in found.sources] == [10, 10, 10]


def test_the_zero_control_passes_or_says_what_is_wrong() -> None:
    same = table({"c4": [0.2] * 4, "self": [0.2] * 4}, recipe="rtn-w4a16")
    seconds = [replace(one, measure="seconds", on="", value=1.0 + one.draw) for one in same]
    kl, timed = checked(analyse(same + seconds, LOWER, data_free=["rtn-w4a16"])).settings
    assert kl.zero_control.passes
    assert kl.headline == (
        "KL on wiki under rtn-w4a16 is the same over all 8 sets, as it must be for a recipe that reads no data."
    )
    assert timed.zero_control is None
    (moved,) = analyse([*same[:-1], replace(same[-1], value=0.2001)], LOWER, data_free=["rtn-w4a16"]).settings
    assert not moved.zero_control.passes
    assert "differs by up to 0.0001 over 8 sets, though the recipe reads no data" in moved.headline


def test_cells_run_twice_measure_the_noise_and_are_no_draws() -> None:
    for again, passes in ((0.10, True), (0.13, False)):
        (found,) = analyse([*table(CLEAR), score("c4", 0, again, repeat=1)], LOWER).settings
        assert [one.description.n for one in found.sources] == [5, 5, 5]
        assert found.implementation_noise.values == 1
        assert found.implementation_noise.passes == passes
        assert ("one set run twice differs by up to 0.03" in found.headline) != passes
    (alone,) = analyse([*table(CLEAR), score("c4", 7, 0.1, repeat=1)], LOWER).settings
    assert alone.implementation_noise is None


def test_paired_sources_are_compared_over_the_draws_that_all_have() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(0, 1, 6)
    values = {"a": list(common), "b": list(common + 0.1 + 0.01 * rng.normal(size=6))}
    cells = table(values)[:-1]
    (apart,) = checked(analyse(cells, LOWER, paired=True)).settings
    assert apart.comparisons[0].told_apart
    assert apart.best_two.draws == 3
    assert apart.comparisons[0].draws == (5, 5)
    (blurred,) = analyse(cells, LOWER).settings
    assert not blurred.comparisons[0].told_apart
    (disjoint,) = checked(analyse([*table(values)[:3], *table(values)[9:]], LOWER, paired=True)).settings
    assert disjoint.comparisons == ()
    assert disjoint.best_two is None
    assert "share no draw" in disjoint.headline


def test_the_headline_of_pairs_goes_by_the_draws_that_all_have() -> None:
    """Over all draws b is best; over the shared ones a is, with b close."""
    values = {"a": [1.0, 2.0, 3.0], "b": [1.1, 2.3, 3.0, -9.0], "c": [2.0, 3.1, 4.0]}
    (found,) = checked(analyse(table(values), LOWER, paired=True)).settings
    assert found.sources[0].source == "b"
    assert found.comparisons[0].better == "a"
    assert "a and b cannot be told apart with 3 draws" in found.headline


def test_recipes_are_compared_on_the_same_sets() -> None:
    second = [replace(one, recipe="spqr", value=one.value - 0.01) for one in table(CLEAR)]
    found = checked(analyse(table(CLEAR) + second[:-1], LOWER)).recipe_differences
    assert [(one.source, one.first, one.second) for one in found] == [
        (source, "spqr", "gptq-w4a16") for source in ("c4", "self", "vocabulary")
    ]
    assert [one.difference.n for one in found] == [5, 5, 4]
    assert all(one.difference.mean == pytest.approx(-0.01) for one in found)
    assert all((one.improvement.probability, one.improvement.verdict) == (1, "better") for one in found)


def test_size_curves_are_rows_and_descriptions_in_rising_order() -> None:
    cells = [replace(one, samples=n, value=one.value / n) for n in (128, 1, 16) for one in table(CLEAR)]
    curves = checked(analyse([*cells, score("once", 0, 1.0)], LOWER)).size_curves
    assert [curve.source for curve in curves] == ["c4", "self", "vocabulary"]
    for curve in curves:
        assert [samples for samples, _ in curve.points] == [1, 16, 128]
        assert curve.points[1][1].mean == pytest.approx(np.mean(CLEAR[curve.source]) / 16)
        assert curve.points[1][1].interval is not None


def test_the_order_of_the_table_does_not_matter_and_other_settings_do_not() -> None:
    cells = [replace(one, recipe=recipe) for recipe in ("gptq-w4a16", "spqr") for one in table(CLEAR)]
    shuffled = random.Random(0).sample(cells, len(cells))
    assert analyse(shuffled, LOWER) == analyse(cells, LOWER)
    assert analyse(table(CLEAR), LOWER).settings[0] == analyse(cells, LOWER).settings[0]


def test_a_cell_with_two_scores_is_refused() -> None:
    with pytest.raises(CalibrantError, match=r"kl of m, gptq-w4a16, c4, seed 0, draw 0, repeat 0 is there twice"):
        analyse([score("c4", 0, 0.1), score("c4", 0, 0.2)], LOWER)


def test_an_empty_table_has_no_findings() -> None:
    found = analyse([], LOWER)
    assert (found.settings, found.recipe_differences, found.size_curves) == ((), (), ())


odd_values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 0.1, 1e-300, 5e-324, 1e99, -1e99, 1e100, math.nan, math.inf, -math.inf]),
    st.floats(-10, 10),
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.sampled_from([0, 1]), st.sampled_from([8, 16])),
        odd_values,
        max_size=30,
    ),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_no_table_gives_a_crash_or_a_nan(cells, higher: bool, paired: bool, data_free: bool) -> None:
    scores = [
        score(source, draw, value, repeat=repeat, samples=samples)
        for (source, draw, repeat, samples), value in cells.items()
    ]
    with np.errstate(all="raise", under="ignore"):
        found = checked(
            analyse(
                scores, {"kl": higher}, paired=paired, left_out=["a"], data_free=["gptq-w4a16"] if data_free else []
            )
        )
    for one in found.settings:
        assert one.headline.endswith(".")
        assert "nan" not in one.headline
