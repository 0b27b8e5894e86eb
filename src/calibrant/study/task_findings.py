"""What compression did to the items of tasks: McNemar's test of every draw, and one p-value over the draws."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from calibrant.evaluation.tasks.results import TaskComparison
from calibrant.study.cells import Cell
from calibrant.study.score_table import Setting
from calibrant.study.statistics.dependent_p_values import combined_p_value
from calibrant.study.statistics.describe import Description, describe
from calibrant.study.statistics.holm import holm


@dataclass(frozen=True)
class TaskFinding:
    """A source's draws against the original on the same items of one task.

    Attributes:
        setting: model, recipe, size, metric and task.
        source: the source; "" for a recipe that reads no data, whose draws are all the same and count once.
        draws: the cell and the comparison of every draw that counts, in their order.
        difference: mean score of a draw's model less the original's, described over draws.
        p_value: McNemar's p-values of the draws as one (``combined_p_value``); items are never counted twice.
        adjusted_p_value: the same by Holm's correction for all sources of the setting.
    """

    setting: Setting
    source: str
    draws: tuple[tuple[Cell, TaskComparison], ...]
    difference: Description
    p_value: float
    adjusted_p_value: float


def task_findings(
    comparisons: Sequence[tuple[Cell, TaskComparison]], *, repeated: Collection[Cell], data_free: Collection[str]
) -> list[TaskFinding]:
    """Findings by setting and source, in the order of ``comparisons``.

    Args:
        comparisons: every compressed model against its original.
        repeated: cells whose set is that of an earlier one, which count as no further draws.
        data_free: recipes that read no data.
    """
    settings: dict[Setting, dict[str, list[tuple[Cell, TaskComparison]]]] = {}
    for cell, one in comparisons:
        if cell.repeat or cell in repeated:
            continue
        setting = Setting(cell.model, cell.recipe, cell.samples, cell.length, one.metric, one.name)
        reads_data = cell.recipe not in data_free
        draws = settings.setdefault(setting, {}).setdefault(cell.source if reads_data else "", [])
        if reads_data or not draws:
            draws.append((cell, one))
    return [finding for setting, sources in settings.items() for finding in _of_setting(setting, sources)]


def _of_setting(setting: Setting, sources: dict[str, list[tuple[Cell, TaskComparison]]]) -> list[TaskFinding]:
    found = []
    for source, draws in sources.items():
        p_value = combined_p_value([one.p_value for _, one in draws])
        difference = describe(np.array([one.difference for _, one in draws]))
        found.append(TaskFinding(setting, source, tuple(draws), difference, p_value, p_value))
    adjusted = holm([one.p_value for one in found])
    return [replace(one, adjusted_p_value=p) for one, p in zip(found, adjusted, strict=True)]
