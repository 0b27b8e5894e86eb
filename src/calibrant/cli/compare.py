"""``calibrant compare``."""

from pathlib import Path
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

    from calibrant import Comparison


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of compressed models.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML page to write (replaces an earlier one).")
    ] = None,
    against: AgainstOption = None,
    text: Annotated[
        str | None,
        typer.Option("--text", help="Held-out text to evaluate on: a file, a folder, hub:owner/name or builtin."),
    ] = None,
    field: FieldOption = "text",
    length: LengthOption = 512,
    wikitext: WikitextOption = None,
    tasks: TasksOption = None,
    data: TaskDataOption = None,
    limit: LimitOption = None,
    task_limit: TaskLimitOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare compressed models: schemes, sizes, times, calibration sets, errors, fallbacks and quality.

    Quality is what `calibrant evaluate --save` kept in each folder, unless --against, --text, --wikitext or --tasks ask
    for an evaluation of all now.

    Example: calibrant compare ./w4 ./pruned --against ./SmolLM2-135M --limit 16 --output comparison.html
    """
    with terminal(quiet, as_json) as screen:
        import calibrant as cb

        found = cb.compare(
            folders,
            against=against,
            text=None if text is None or text == "none" else cb.Corpus(text, field),
            length=length,
            wikitext=wikitext,
            tasks=task_names(tasks),
            data=data,
            limit=limit,
            task_limit=task_limit,
            device=device,
            dtype=dtype,
            progress=screen.progress,
        )
        page = None if output is None else str(found.write_page(output))
        screen.result(
            {**found.as_json(), "page": page},
            comparison_table(found),
            *found.findings,
            *([f"page: {page}"] if page is not None else []),
        )


def comparison_table(found: "Comparison") -> "Table":
    """All in one table, a column for each model: what a page shows in rows is turned."""
    from rich.table import Table
    from rich.text import Text

    from calibrant.report.tables import Undefined, value_text

    table = Table()
    table.add_column("")
    for name in found.outputs:
        table.add_column(Text(name), justify="right")
    models, errors, quality, fallbacks = found.tables
    for number, column in enumerate(models.columns[1:], 1):
        table.add_row(column.name, *(value_text(row[number]) for row in models.rows))
    table.add_section()
    for row in errors.rows:
        table.add_row(Text(f"error of {row[0]}"), *map(value_text, row[1:]))
    table.add_section()
    measured: dict[str, dict[str, str]] = {}
    for model, on, *values in quality.rows:
        for column, value in zip(quality.columns[2:], values, strict=True):
            if not isinstance(value, Undefined):
                measured.setdefault(f"{column.name}, {on}", {})[str(model)] = value_text(value)
    for label, cells in measured.items():
        table.add_row(Text(label), *(cells.get(name, "") for name in found.outputs))
    table.add_section()
    for model, layer, why in fallbacks.rows:
        table.add_row(Text(f"fell back: {layer}"), *(Text(str(why)) if one == model else "" for one in found.outputs))
    return table
