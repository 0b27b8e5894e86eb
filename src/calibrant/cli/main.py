"""The ``calibrant`` command."""

import signal
import sys

import typer

from calibrant.cli.compress import compress
from calibrant.cli.data import app as data_app
from calibrant.cli.demo import demo
from calibrant.cli.evaluate import evaluate
from calibrant.cli.recipes import recipes
from calibrant.errors import CalibrantError

_USAGE, _INTERRUPTED, _TERMINATED = 2, 130, 143

app = typer.Typer(
    name="calibrant",
    help="Calibration data and post-training compression for language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(compress)
app.add_typer(data_app, name="data")
app.command()(evaluate)
app.command()(recipes)
app.command()(demo)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if version:
        import calibrant

        typer.echo(calibrant.__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; user errors are one sentence and exit status 2."""
    # A polite kill unwinds like any exit, so that nothing half-written stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    try:
        app()
    except CalibrantError as error:
        print(f"calibrant: {error}", file=sys.stderr)
        sys.exit(_USAGE)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            print("calibrant: interrupted, nothing was left behind", file=sys.stderr)
        raise
