"""``calibrant data inspect``."""

from pathlib import Path
from typing import Annotated

import typer

from calibrant.cli.console import DeviceOption, DtypeOption, JsonOption, QuietOption, terminal


def inspect(
    folders: Annotated[list[Path], typer.Argument(help="Calibration set folders.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Model folder with the tokenizer; by default the model that a manifest names."
        ),
    ] = None,
    perplexity: Annotated[
        bool, typer.Option("--perplexity", help="Also run the model over the sets to measure perplexity.")
    ] = False,
    html: Annotated[
        Path,
        typer.Option(
            "--html", help="HTML page to write (replaces an earlier one): curves, overlap, odd rows, samples."
        ),
    ] = Path("inspection.html"),
    rows: Annotated[int, typer.Option("--rows", min=0, help="Rows per set to show as text in the terminal.")] = 1,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show statistics and rows of calibration sets side by side, and write them to an HTML page.

    Example: calibrant data inspect ./self ./c4 -m ./SmolLM2-135M --perplexity --html sets.html
    """
    with terminal(quiet, as_json) as screen:
        from rich.markup import escape
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        import calibrant as cb
        from calibrant.calibration.text_statistics import NUMBER_LABELS
        from calibrant.output_folder import whole_file
        from calibrant.report.inspection import check_page

        check_page(html)
        found = cb.inspect_sets(
            folders, model=model, perplexity=perplexity, device=device, dtype=dtype, progress=screen.progress
        )
        page = found.page()
        with whole_file(html) as beside:
            beside.write_text(page, encoding="utf-8")
        table = Table("", *(escape(one.name) for one in found.sets))
        for name, label in NUMBER_LABELS.items():
            values = [one.statistics.numbers[name] for one in found.sets]
            shown = "not asked for (--perplexity)" if name == "perplexity" and not perplexity else "-"
            table.add_row(Text(label, style="bold"), *(_number_text(value, shown) for value in values))
        odd = [
            Text(f"{one.name}, row {row.row}: {'; '.join(row.reasons)}")
            for one in found.sets
            for row in one.statistics.odd[:3]
        ]
        panels = [
            Panel(Text(text), title=Text(f"{one.name}, row {index}"))
            for one in found.sets
            for index, text in enumerate(one.texts[:rows])
        ]
        screen.result(found.as_json(), table, *odd, *panels, Text(f"page: {html}"))


def _number_text(value: float | None, missing: str) -> str:
    if value is None:
        return missing
    return f"{value:,.0f}" if value == int(value) or value >= 10_000 else f"{value:.4g}"
