"""``calibrant evaluate``."""

from typing import TYPE_CHECKING, Annotated

import typer

from calibrant.cli.console import (
    DeviceOption,
    DtypeOption,
    FieldOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    QuietOption,
    terminal,
)

if TYPE_CHECKING:
    from rich.table import Table

    from calibrant import Evaluation


def evaluate(
    model: ModelArgument,
    against: Annotated[
        str | None, typer.Option("--against", help="Original model; the divergence from it is measured.")
    ] = None,
    text: Annotated[
        str, typer.Option("--text", help="Held-out text: a file, a folder, hub:owner/name or builtin.")
    ] = "builtin",
    field: FieldOption = "text",
    length: LengthOption = 512,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use only the first windows of the text.")] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity on fixed windows of a text and, with --against, the divergence from the original model.

    Example: calibrant evaluate ./SmolLM2-w4 --against ./SmolLM2-135M --text wiki.txt
    """
    with terminal(quiet, as_json) as screen:
        from dataclasses import asdict

        import calibrant as cb

        found = cb.evaluate(
            model,
            against=against,
            text=cb.Corpus(text, field),
            length=length,
            limit=limit,
            device=device,
            dtype=dtype,
            progress=screen.progress,
        )
        screen.result(asdict(found), evaluation_table({model: found}))


def evaluation_table(found: "dict[str, Evaluation]") -> "Table":
    """Table of evaluations: one row per measure, one column per model."""
    from rich.table import Table
    from rich.text import Text

    first = next(iter(found.values()))
    table = Table(title=f"{first.windows} windows of {first.length} tokens")
    table.add_column("")
    rows: dict[str, list[str]] = {}
    for name, evaluation in found.items():
        table.add_column(Text(name), justify="right")
        cells = {
            "perplexity": _interval(evaluation.perplexity.value, evaluation.perplexity.low, evaluation.perplexity.high)
        }
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


def _interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _with_error(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form}}"
