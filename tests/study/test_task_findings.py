"""Tasks item by item over draws, against numbers written down or computed another way."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import calibrant as cb
from calibrant.study.statistics.dependent_p_values import combined_p_value
from tests.report.study_store import GAINED, ITEMS, LOST, plan, write_study

TASKS = {"names": ["piqa", "copa"], "data": "."}


def test_half_the_draws_decide_the_combined_p_value() -> None:
    assert combined_p_value([0.03]) == 0.03
    assert combined_p_value([0.01, 0.04]) == 0.04
    assert combined_p_value([0.5, 0.001, 0.01]) == pytest.approx(0.01 * 3 / 2)
    assert combined_p_value([0.9, 0.001, 0.01, 0.02]) == pytest.approx(0.02 * 4 / 3)
    assert combined_p_value([0.9, 0.9, 0.8]) == 1.0
    with pytest.raises(cb.CalibrantError, match="no p-values"):
        combined_p_value([])


@pytest.mark.parametrize("draws", [3, 4, 5])
def test_the_combined_p_value_holds_its_level_however_draws_depend(draws: int) -> None:
    """Draws that are equal, independent, or as bad as can be: exactly half of them small, together."""
    rng = np.random.default_rng(0)
    needed = draws // 2 + 1
    shared = rng.random((20_000, 1))
    independent = rng.random((20_000, draws))
    # With chance alpha * draws / needed, ``needed`` random draws have a p-value below alpha.
    worst = np.ones((20_000, draws))
    hit = rng.random(20_000) < 0.05 * draws / needed
    worst[hit, :needed] = 0.05 * rng.random((hit.sum(), 1))
    for given in (np.repeat(shared, draws, axis=1), independent, rng.permuted(worst, axis=1)):
        share = np.mean([combined_p_value(row.tolist()) <= 0.05 for row in given])
        assert share <= 0.05 + 4 * (0.05 * 0.95 / 20_000) ** 0.5


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> cb.Study:
    made = plan(tasks=TASKS, samples=8, recipes=["wanda-2:4", "rtn-w4"], draws=3)
    return write_study(tmp_path_factory.mktemp("tasks"), made)


def test_draws_of_a_source_are_tested_each_and_joined_without_counting_items_twice(study: cb.Study) -> None:
    found = [one for one in study.task_findings() if one.setting.recipe == "wanda-2:4"]
    assert [(one.setting.on, one.source) for one in found] == [
        (task, source) for task in ("copa", "piqa") for source in LOST
    ]
    for one in found:
        gained, lost = GAINED[one.source], [LOST[one.source] + (draw == 1) for draw in range(3)]
        assert [cell.draw for cell, _ in one.draws] == [0, 1, 2]
        assert [draw.items for _, draw in one.draws] == [ITEMS] * 3
        assert [draw.only_original_right for _, draw in one.draws] == lost
        assert [draw.only_model_right for _, draw in one.draws] == [gained] * 3
        assert [draw.both_right for _, draw in one.draws] == [30 - n for n in lost]
        each = sorted(stats.binomtest(gained, gained + n).pvalue if gained + n else 1.0 for n in lost)
        assert one.p_value == pytest.approx(min(1.0, each[1] * 3 / 2))
        assert one.difference.mean == pytest.approx(np.mean([(gained - n) / ITEMS for n in lost]))
    first = [one for one in found if one.setting.on == "copa"]
    assert {one.source for one in first if one.adjusted_p_value < 0.05} == {"vocabulary"}
    vocabulary = next(one for one in first if one.source == "vocabulary")
    assert vocabulary.adjusted_p_value == pytest.approx(3 * vocabulary.p_value)


def test_recipes_without_data_and_second_runs_count_once(study: cb.Study) -> None:
    compared = [cell for cell, _ in study.task_comparisons()]
    assert sum(cell.repeat for cell in compared) == 4  # second runs, of two recipes on two tasks
    without = [one for one in study.task_findings() if one.setting.recipe == "rtn-w4"]
    assert [(one.source, len(one.draws)) for one in without] == [("", 1), ("", 1)]


def test_the_report_has_both_tables(study: cb.Study, tmp_path: Path) -> None:
    page = study.report(tmp_path).read_text(encoding="utf-8")
    assert "Tasks, item by item" in page
    assert "any (reads no data)" in page
    (header, *rows) = (tmp_path / "tables" / "tasks.csv").read_text(encoding="utf-8").splitlines()
    assert header == (
        "source,model,recipe,rows,length,measure,on,draws,items,right in both,only original,only compressed,"
        "wrong in both,difference,difference low,difference high,draws with p < 0.05,p,Holm p"
    )
    assert len(rows) == 2 * (3 + 1)
    assert len((tmp_path / "tables" / "task_draws.csv").read_text(encoding="utf-8").splitlines()) == 1 + 2 * (9 + 1)
