"""``calibrant data``: generate, select, mix, score, rebuild, inspect; one module per command."""

import typer

from calibrant.cli.data.generate import generate
from calibrant.cli.data.inspect import inspect
from calibrant.cli.data.mix import mix
from calibrant.cli.data.rebuild import rebuild
from calibrant.cli.data.score import score
from calibrant.cli.data.select import select

app = typer.Typer(
    help="Generate, select, mix, score, rebuild and inspect calibration data.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
for command in (generate, select, mix, score, rebuild, inspect):
    app.command()(command)
