"""``calibrant study``: plan, run, recommend, show, report, export; one module per command."""

import typer

from calibrant.cli.study.export import export
from calibrant.cli.study.plan import plan
from calibrant.cli.study.recommend import recommend
from calibrant.cli.study.report import report
from calibrant.cli.study.run import run
from calibrant.cli.study.show import show

app = typer.Typer(
    help="Measure what the calibration data does, over sources, draws, sizes and recipes.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
for command in (plan, run, recommend, show, report, export):
    app.command()(command)
