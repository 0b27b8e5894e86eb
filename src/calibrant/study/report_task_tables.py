"""The tables of a study's report about items of tasks."""

from collections.abc import Sequence

from calibrant.evaluation.tasks.results import TaskComparison
from calibrant.report.tables import Column, Estimate, Table, Value
from calibrant.study.report_tables import KEYS, ONE_DRAW, ends, keys
from calibrant.study.task_findings import TaskFinding

_NO_DATA = "any (reads no data)"
_NO_TASKS = "The study has no tasks with scores of the original and of a compressed model."
_COUNTS = ("items", "right in both", "only original", "only compressed", "wrong in both")


def task_tables(findings: Sequence[TaskFinding]) -> list[Table]:
    """The findings by source, and every draw that counts."""
    return [_tasks(findings), _draws(findings)]


def _tasks(findings: Sequence[TaskFinding]) -> Table:
    rows: list[tuple[Value, ...]] = []
    for one in findings:
        counts = [_mean([_counts(draw)[place] for _, draw in one.draws]) for place in range(len(_COUNTS))]
        difference = Estimate(one.difference.mean, ends(one.difference.interval), ONE_DRAW)
        alone = sum(draw.p_value < 0.05 for _, draw in one.draws)
        p_values = (f"{alone} of {len(one.draws)}", one.p_value, one.adjusted_p_value)
        rows.append((one.source or _NO_DATA, *keys(one.setting), len(one.draws), *counts, difference, *p_values))
    return Table(
        "tasks",
        "Tasks, item by item",
        "Every source against the original on the same items: counts of items are means over draws, the difference is "
        "the mean score of compressed less original with Student's 95 % interval over draws. p: McNemar's exact test "
        "of every draw, combined by Rüger's rule, since draws share the items and their counts cannot be added up; "
        "Holm p: corrected for all sources of the setting.",
        _NO_TASKS,
        (
            Column("source", role="source"),
            *KEYS,
            Column("draws", "number"),
            *(Column(name, "number") for name in _COUNTS),
            Column("difference", "estimate"),
            Column("draws with p < 0.05"),
            Column("p", "number"),
            Column("Holm p", "number"),
        ),
        tuple(rows),
    )


def _draws(findings: Sequence[TaskFinding]) -> Table:
    rows: list[tuple[Value, ...]] = []
    for found in findings:
        for cell, one in found.draws:
            interval = None if one.low is None or one.high is None else (one.low, one.high)
            difference = Estimate(one.difference, interval, "one item has no spread")
            place = (found.source or _NO_DATA, *keys(found.setting), cell.seed, cell.draw)
            rows.append((*place, *_counts(one), difference, one.p_value))
    return Table(
        "task_draws",
        "Tasks, draw by draw",
        "Every compressed model against the original on the same items: the difference of mean scores with Student's "
        "95 % interval over items, and the p-value of McNemar's exact test, uncorrected.",
        _NO_TASKS,
        (
            Column("source", role="source"),
            *KEYS,
            Column("seed", "number", "key"),
            Column("draw", "number"),
            *(Column(name, "number") for name in _COUNTS),
            Column("difference", "estimate"),
            Column("McNemar p", "number"),
        ),
        tuple(rows),
    )


def _counts(one: TaskComparison) -> tuple[int, ...]:
    return one.items, one.both_right, one.only_original_right, one.only_model_right, one.both_wrong


def _mean(values: list[int]) -> Value:
    """Whole numbers stay whole."""
    mean = sum(values) / len(values)
    return int(mean) if mean.is_integer() else mean
