"""The search for the source to take runs cells of a plan, and no more than it needs."""

from pathlib import Path

import pytest

import calibrant as cb

from .small_study import write_plan


def test_a_search_runs_the_draws_that_it_asks_for(folder: Path) -> None:
    write_plan(folder / "study.yaml", recipes="wanda.yaml", samples=2, most_draws=4)
    found = cb.recommend_source(folder / "study.yaml", cache=folder / "cache", budget=6)
    assert found.cells == 6
    assert {source: len(scores) for source, scores in found.scores.items()} == {"text": 3, "vocabulary": 3}
    study = cb.Study(folder / "small.recommend")
    assert study.counts() == {"done": 6, "failed": 0, "waiting": 0}
    kl = {(one.source, one.draw): one.value for one in study.scores() if one.measure == "kl"}
    assert {(source, draw): score for source, own in found.scores.items() for draw, score in enumerate(own)} == kl
    assert found.recommended in (None, "text", "vocabulary")


@pytest.mark.parametrize(("changes", "options", "said"), [
    ({}, {}, "for one model, recipe and size; recipes has several"),
    ({"recipes": "wanda.yaml", "samples": [2, 4]}, {}, "for one model, recipe and size; samples has several"),
    ({"recipes": "wanda.yaml", "samples": 2}, {"budget": 5}, "5 cells are too few for 2 sources"),
    ({"recipes": "wanda.yaml", "samples": 2, "models": "nowhere"}, {}, "nowhere"),
])  # fmt: skip
def test_what_cannot_be_searched(folder: Path, changes: dict, options: dict, said: str) -> None:
    write_plan(folder / "study.yaml", **changes)
    with pytest.raises(cb.CalibrantError, match=said):
        cb.recommend_source(folder / "study.yaml", cache=folder / "cache", **options)
