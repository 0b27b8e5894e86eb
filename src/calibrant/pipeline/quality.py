"""Evaluations as a table."""

from collections.abc import Mapping

from scipy import stats

from calibrant.evaluation.comparison import Evaluation
from calibrant.report.tables import Column, Estimate, Table, Undefined, Value

_ONE_WINDOW = "one window has no spread"
_NOT_MEASURED = Undefined("not measured")


def quality_table(evaluations: Mapping[str, Evaluation]) -> Table:
    """One row for each model and text or task; ``evaluations`` are by the model's name."""
    rows = [row for name, found in evaluations.items() for row in _rows(name, found)]
    columns = (
        Column("model", role="key"),
        Column("measured on"),
        Column("perplexity", "estimate"),
        Column("log ratio", "estimate"),
        Column("KL", "estimate"),
        Column("same top token", "number"),
        Column("score", "number"),
        Column("score, original", "number"),
        Column("difference", "estimate"),
        Column("McNemar p", "number"),
    )
    filled = [i for i in range(len(columns)) if not rows or any(row[i] != _NOT_MEASURED for row in rows)]
    return Table(
        "quality",
        "Quality",
        "Measured on held-out text and tasks: perplexity, log-perplexity ratio and mean KL divergence from the "
        "original in nats, with 95 % intervals over windows; the share of positions with the original's most likely "
        "token; scores of tasks, their difference from the original's, and McNemar's p-value on the same items. Texts"
        " of one hash are the same tokens.",
        "No evaluation was saved or asked for.",
        tuple(columns[i] for i in filled),
        tuple(tuple(row[i] for i in filled) for row in rows),
    )


def kl_estimate(found: Evaluation) -> Estimate:
    """Mean KL divergence from the original, with a 95 % interval over windows (Student's t)."""
    assert found.divergence is not None
    mean, error = found.divergence.kl_mean, found.divergence.kl_standard_error
    if error is None:
        return Estimate(mean, None, _ONE_WINDOW)
    half = float(stats.t.ppf(0.975, found.windows - 1)) * error
    return Estimate(mean, (mean - half, mean + half), _ONE_WINDOW)


def _rows(name: str, found: Evaluation) -> list[tuple[Value, ...]]:
    nothing = (_NOT_MEASURED,) * 4
    rows: list[tuple[Value, ...]] = []
    for label, text in (("text", found), ("WikiText", found.wikitext)):
        if text is not None and text.perplexity is not None:
            rows.append((name, f"{label}: {text_code(text)}", *_of_text(text), *nothing))
    compared = {(one.name, one.metric): one for one in found.task_comparisons}
    originals = {one.name: one.metrics for one in found.original_tasks}
    for task in found.tasks:
        for metric, value in task.metrics.items():
            theirs: Value = originals[task.name][metric].value if task.name in originals else _NOT_MEASURED
            pair = compared.get((task.name, metric))
            against: tuple[Value, Value] = (_NOT_MEASURED, _NOT_MEASURED)
            if pair is not None:
                interval = None if pair.low is None or pair.high is None else (pair.low, pair.high)
                against = Estimate(pair.difference, interval, "one item has no spread"), pair.p_value
            rows.append((name, f"{task.name}, {metric}", *nothing, value.value, theirs, *against))
    return rows


def text_code(found: Evaluation) -> str:
    """Windows of a text, and the beginning of their hash."""
    return f"{found.windows} x {found.length} tokens, hash {found.windows_sha256[:8]}"


def _of_text(found: Evaluation) -> tuple[Value, ...]:
    assert found.perplexity is not None
    own, divergence = found.perplexity, found.divergence
    interval = None if own.low is None or own.high is None else (own.low, own.high)
    perplexity = Estimate(own.value, interval, _ONE_WINDOW)
    if divergence is None:
        return perplexity, *(_NOT_MEASURED,) * 3
    low, high = divergence.log_ratio_low, divergence.log_ratio_high
    ratio = Estimate(divergence.log_ratio, None if low is None or high is None else (low, high), _ONE_WINDOW)
    return perplexity, ratio, kl_estimate(found), divergence.same_top
