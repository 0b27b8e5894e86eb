"""What making a set is expected to take."""

from pathlib import Path
from typing import Any

import pytest

import calibrant as cb
from calibrant.progress import NoProgress
from calibrant.study.cache import Cache
from calibrant.study.resolve import resolve
from calibrant.study.set_seconds import set_seconds

from .small_study import write_plan


def seconds(folder: Path, source: dict[str, Any], **changes: Any) -> float:
    """Of the first set, at a million weights and a gigaflop a second."""
    plan = write_plan(folder / "study.yaml", sources={"one": source}, **changes)
    resolved = resolve(cb.load_study_plan(plan), Cache(folder / "cache"), NoProgress())
    work = resolved.cells[0]
    prepared = resolved.prepared[work.cell.model, work.cell.recipe]
    return set_seconds(work.set_step, prepared, weights=10**6, rate=1e9)


def test_text_takes_longer_the_more_of_it_is_read(folder: Path) -> None:
    (folder / "long.txt").write_text((folder / "text.txt").read_text() * 1000)
    short, long = (seconds(folder, {"corpus": name}) for name in ("text.txt", "long.txt"))
    assert long - short == pytest.approx(0.25e-6 * 999 * (folder / "text.txt").stat().st_size)


def test_a_model_that_runs_over_all_candidates_takes_longest(folder: Path) -> None:
    corpus = {"corpus": "text.txt"}
    assert seconds(folder, {**corpus, "strategy": "zipcal"}) < seconds(folder, {**corpus, "strategy": "perplexity"})


def test_a_text_that_the_model_writes_takes_longer_than_random_tokens(folder: Path) -> None:
    """And twice as long with twice the tokens in a row, but hardly longer with more rows."""
    nothing = seconds(folder, {"strategy": "vocabulary"})
    written, longer, more = (
        seconds(folder, {"strategy": "self"}, samples=samples, length=length) - nothing
        for samples, length in ((4, 16), (4, 32), (8, 32))
    )
    assert longer == pytest.approx(2 * written)
    assert 0 < longer < more < 1.2 * longer


def test_a_saved_set_takes_nothing(folder: Path, llama: Path) -> None:
    cb.generate(llama, strategy="vocabulary", samples=4, length=16).save(folder / "saved")
    assert seconds(folder, {"sets": ["saved"]}) == 0
