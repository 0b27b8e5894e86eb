"""``calibrant evaluate``."""

from typing import TYPE_CHECKING, Annotated

import typer

from calibrant.cli.console import (
    AgainstOption,
    DeviceOption,
    DtypeOption,
    FieldOption,
    JsonOption,
    LengthOption,
    LimitOption,
    ModelArgument,
    QuietOption,
    TaskDataOption,
    TaskLimitOption,
    TasksOption,
    WikitextOption,
    task_names,
    terminal,
)

if TYPE_CHECKING:
    from rich.table import Table

    from calibrant import Evaluation


def evaluate(
    model: ModelArgument,
    against: AgainstOption = None,
    text: Annotated[
        str, typer.Option("--text", help="Held-out text: a file, a folder, hub:owner/name or builtin; none for none.")
    ] = "builtin",
    field: FieldOption = "text",
    length: LengthOption = 512,
    wikitext: WikitextOption = None,
    tasks: TasksOption = None,
    data: TaskDataOption = None,
    limit: LimitOption = None,
    task_limit: TaskLimitOption = None,
    save: Annotated[
        bool,
        typer.Option("--save", help="Keep the result in the output folder, for `calibrant report` and `compare`."),
    ] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity on fixed windows of a text, scores on tasks and, with --against, the change from the original.

    Example: calibrant evaluate ./SmolLM2-w4 --against ./SmolLM2-135M --tasks piqa,arc_easy --data ./data
    """
    with terminal(quiet, as_json) as screen:
        from dataclasses import asdict

        import calibrant as cb

        found = cb.evaluate(
            model,
            against=against,
            text=None if text == "none" else cb.Corpus(text, field),
            length=length,
            wikitext=wikitext,
            tasks=task_names(tasks),
            data=data,
            limit=limit,
            task_limit=task_limit,
            save=save,
            device=device,
            dtype=dtype,
            progress=screen.progress,
        )
        tables = []
        if found.windows:
            tables.append(evaluation_table({model: found}, text))
        if found.wikitext is not None:
            tables.append(evaluation_table({model: found.wikitext}, f"{wikitext}, by the papers' protocol"))
        if found.tasks:
            tables += task_tables(found)
        screen.result(asdict(found), *tables)


def evaluation_table(found: "dict[str, Evaluation]", text: str) -> "Table":
    """Table of evaluations on ``text``: one row per measure, one column per model."""
    from rich.table import Table
    from rich.text import Text

    first = next(iter(found.values()))
    spread = "brackets: 95 % intervals over windows; ±: standard errors" if first.windows > 1 else None
    name = "the built-in text" if text == "builtin" else text
    table = Table(title=f"{first.windows:,} windows of {first.length} tokens of {name}", caption=spread)
    table.add_column("")
    rows: dict[str, list[str]] = {}
    for name, evaluation in found.items():
        table.add_column(Text(name), justify="right")
        cells = {}
        if evaluation.perplexity is not None:
            own = evaluation.perplexity
            cells["perplexity"] = _interval(own.value, own.low, own.high)
        if evaluation.original is not None and evaluation.divergence is not None:
            original, divergence = evaluation.original, evaluation.divergence
            cells["perplexity of the original"] = _interval(original.value, original.low, original.high)
            ratio = (divergence.log_ratio, divergence.log_ratio_low, divergence.log_ratio_high)
            cells["log perplexity ratio"] = _interval(*ratio)
            cells["mean KL"] = _with_error(divergence.kl_mean, divergence.kl_standard_error, ".4f")
            cells["KL percentiles 50 / 90 / 99"] = " / ".join(
                f"{divergence.kl_percentiles[p]:.4f}" for p in ("50", "90", "99")
            )
            cells["same top token"] = _with_error(divergence.same_top, divergence.same_top_standard_error, ".1%")
        for label, cell in cells.items():
            rows.setdefault(label, []).append(cell)
    for label, values in rows.items():
        table.add_row(label, *values)
    return table


def task_tables(found: "Evaluation") -> "list[Table]":
    """The scores of every metric; with an original, the comparisons item by item as well."""
    from rich.table import Table

    scores = Table(title="tasks", caption="±: standard errors")
    for name in ("task", "items", "metric", "score", *(["original"] if found.original_tasks else [])):
        scores.add_column(name, justify="left" if name in ("task", "metric") else "right")
    originals = {result.name: result.metrics for result in found.original_tasks}
    for result in found.tasks:
        for metric, own in result.metrics.items():
            both = (own, originals[result.name][metric]) if originals else (own,)
            cells = [_with_error(one.value, one.standard_error, ".4f") for one in both]
            scores.add_row(result.name, str(result.items), metric, *cells)
    if not found.task_comparisons:
        return [scores]
    meaning = "gained, lost: only the model, only the original has them right; p: McNemar's exact test"
    compared = Table(title="the same items against the original", caption=meaning)
    for name in ("task", "metric", "difference", "gained", "lost", "p"):
        compared.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for one in found.task_comparisons:
        right = str(one.only_model_right), str(one.only_original_right)
        compared.add_row(
            one.name, one.metric, _interval(one.difference, one.low, one.high), *right, f"{one.p_value:.3g}"
        )
    return [scores, compared]


def _interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _with_error(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form}}"
