"""The finding of a whole study in sentences."""

import re

import pytest

from calibrant.study.analysis import analyse
from calibrant.study.answer import Answer, answer
from calibrant.study.scores import Score

COSTS = ("seconds",)
DONE = {"done": 20, "failed": 0, "waiting": 0}
NOISE = (0.0, 0.001, -0.001, 0.002, -0.002)


def scores(means: dict[str, float], texts: tuple[str, ...] = ("wiki",), recipe: str = "gptq", **changed) -> list[Score]:
    place = {"model": "m", "recipe": recipe, "samples": 8, "length": 16, "seed": 0, "repeat": 0, "measure": "kl"}
    return [
        Score(**{**place, "source": source, "draw": draw, "on": text, "value": mean + NOISE[draw], **changed})
        for text in texts
        for source, mean in means.items()
        for draw in range(5)
    ]


def answered(found: list[Score], counts: dict[str, int] = DONE, **options) -> Answer:
    return answer(analyse(found, {"kl": False, "perplexity": False, "seconds": False}, **options), counts, COSTS)


def test_one_setting_answers_for_the_study() -> None:
    found = scores({"c4": 0.1, "self": 0.3})
    said = answered(found + scores({"c4": 9.0, "self": 3.0}, measure="perplexity"))
    assert said == Answer([analyse(found, {"kl": False}).settings[0].headline], [])


def test_a_source_that_is_best_everywhere() -> None:
    first, second = answered(scores({"c4": 0.1, "self": 0.3}, ("wiki", "code"))).findings
    assert first.startswith("The source explains 100 % of the variance of KL over 2 texts; the 95 % intervals span ")
    assert second == "c4 has the best mean in all 2, and is told apart from every other source there."


def test_a_best_source_that_may_be_chance() -> None:
    found = scores({"c4": 0.1, "self": 0.1001, "noise": 0.5}, ("wiki", "code"))
    first, without, second = answered(found, left_out=["noise"]).findings
    assert first.startswith("The source explains ")
    assert re.fullmatch(r"Without noise it explains 0 %; the 95 % intervals span 0 to \d+ %\.", without)
    assert second == "c4 has the best mean in all 2, but cannot be told apart from self with 5 draws in all of them."


def test_a_study_of_tasks_alone_is_answered_by_their_mean_accuracy() -> None:
    found = scores({"c4": 0.6, "self": 0.4}, ("piqa", "copa"), measure="acc") + scores(
        {"c4": 0.6, "self": 0.4}, ("",), measure="accuracy"
    )
    said = answer(analyse(found, {"acc": True, "accuracy": True}), DONE, COSTS)
    assert said.findings[0].startswith("The source explains 100 % of the variance of accuracy under gptq")
    assert said.findings[0].endswith("; c4 is better than the other source.")


def test_a_source_that_was_not_tested_is_not_called_alike() -> None:
    found = scores({"c4": 0.1, "self": 0.3, "greedy": 0.9}, ("wiki", "code"))
    few = [one for one in found if one.source != "greedy" or one.draw == 0]
    assert answered(few).findings[-1] == (
        "c4 has the best mean in all 2, and is told apart from every other source that was tested there; greedy could "
        "not be tested."
    )


def test_no_source_that_leads() -> None:
    found = [
        one
        for best, text in zip("abc", ("x", "y", "z"), strict=True)
        for one in scores({name: 0.1 if name == best else 0.3 for name in "abc"}, (text,))
    ]
    assert answered(found).findings[-1] == (
        "No source leads: a has the best mean most often, in 1 of 3, and is told apart from every other source there."
    )


def test_recipes_that_read_no_data_are_controls() -> None:
    good = scores({"c4": 0.1, "self": 0.3}) + scores({"c4": 0.2, "self": 0.2}, recipe="rtn", value=0.2)
    bad = scores({"c4": 0.1, "self": 0.3}) + scores({"c4": 0.2, "self": 0.2}, recipe="rtn")
    assert answered(good, data_free=["rtn"]) == answered(scores({"c4": 0.1, "self": 0.3}))
    said = answered(bad, data_free=["rtn"])
    assert said.reservations == [
        "A recipe that reads no data scores differently on different sets: see the controls first."
    ]


@pytest.mark.parametrize("texts", [("wiki",), ("wiki", "code")])
def test_equal_scores(texts: tuple[str, ...]) -> None:
    (said,) = answered(scores({"c4": 0.1, "self": 0.1}, texts, value=0.1)).findings
    assert said.startswith("KL ")
    assert "with every source and draw" in said


def test_cells_that_are_missing_are_named_first() -> None:
    counts = {"done": 3, "failed": 2, "waiting": 5}
    assert answered([], counts) == Answer(
        ["There is no usable score of a recipe that reads data, so that nothing can be said of the sources."],
        ["2 of 10 cells failed; no number includes them.", "5 of 10 cells have not run yet: this is preliminary."],
    )
    few = [one for one in scores({"c4": 0.1, "self": 0.3}) if one.draw < 3]
    (said,) = answered(few).reservations
    assert said.startswith("With 3 draws a source only large differences can be seen: that two cannot be told apart ")
