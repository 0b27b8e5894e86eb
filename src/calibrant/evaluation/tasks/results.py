"""Results of tasks, and the paired comparison of two models on the same items."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibrant.errors import CalibrantError


@dataclass(frozen=True)
class Metric:
    """A metric's value over all items and its standard error (None for a single item)."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class TaskResult:
    """One model on one task.

    ``metrics`` are those of lm-eval's definition under its names: "acc", "acc_norm", "perplexity", or
    "exact_match,strict-match" where answers are filtered. ``main`` is the one that ``scores`` are of, one score an item
    in the task's order: "acc_norm" where the definition has it, else "acc", else the first ("exact_match,strict-match"
    of GSM8K). ``shots`` is the number of examples in each prompt. ``truncated`` counts requests that lost their
    beginning to the model's context. ``version`` is the definition's, ``sha256`` lm-eval's own hash over documents,
    prompts and targets (of a group: over its tasks' hashes), ``revision`` the hub data set's commit, None for files.
    """

    name: str
    metrics: dict[str, Metric]
    main: str
    scores: tuple[float, ...]
    shots: int
    truncated: int
    version: str
    sha256: str
    lm_eval_version: str
    revision: str | None = None

    @property
    def items(self) -> int:
        """Number of items."""
        return len(self.scores)


@dataclass(frozen=True)
class TaskComparison:
    """A model against the original on the same items of one task, by the main metric (0 or 1 an item).

    ``p_value`` is that of McNemar's exact test (Psychometrika 12, 1947): two-sided, binomial over the items that only
    one of both has right; 1.0 if there is none. ``difference`` is the model's mean score minus the original's;
    its standard error is that of the mean of the items' differences, and the 95 % interval uses Student's t. These are
    None for a single item.
    """

    name: str
    metric: str
    items: int
    both_right: int
    only_model_right: int
    only_original_right: int
    both_wrong: int
    p_value: float
    difference: float
    standard_error: float | None
    low: float | None
    high: float | None


def compare_tasks(model: Sequence[TaskResult], original: Sequence[TaskResult]) -> tuple[TaskComparison, ...]:
    """Compare the results of a model with the original's, task by task.

    Raises:
        CalibrantError: the results are not of the same tasks and items.
    """
    if [result.name for result in model] != [result.name for result in original]:
        raise CalibrantError("the results are not of the same tasks; score both models on the same `tasks`")
    return tuple(_compare(mine, theirs) for mine, theirs in zip(model, original, strict=True))


def _compare(model: TaskResult, original: TaskResult) -> TaskComparison:
    if (model.sha256, model.main) != (original.sha256, original.main):
        raise CalibrantError(
            f"{model.name}: the results are not of the same items; score both models with the same data and limit"
        )
    return compare_items(model.name, model.main, model.scores, original.scores)


def compare_items(name: str, metric: str, scores: Sequence[float], original: Sequence[float]) -> TaskComparison:
    """Compare two models by their scores on the same items of the task ``name``, in the same order."""
    from scipy import stats  # slow to import, and only comparisons need it

    mine, theirs = np.array(scores) > 0.5, np.array(original) > 0.5
    gained, lost = int((mine & ~theirs).sum()), int((~mine & theirs).sum())
    difference = np.array(scores) - np.array(original)
    mean, error = float(difference.mean()), standard_error(difference)
    half = None if error is None else float(stats.t.ppf(0.975, len(difference) - 1)) * error
    return TaskComparison(
        name=name,
        metric=metric,
        items=len(mine),
        both_right=int((mine & theirs).sum()),
        only_model_right=gained,
        only_original_right=lost,
        both_wrong=int((~mine & ~theirs).sum()),
        p_value=float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
        difference=mean,
        standard_error=error,
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
    )


def standard_error(values: np.ndarray) -> float | None:
    """Standard error of the mean of independent values; None for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
