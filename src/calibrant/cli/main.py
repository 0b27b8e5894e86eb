"""The ``calibrant`` command."""

import os
import signal
import sys
from typing import Any

import typer

from calibrant.cli.compare import compare
from calibrant.cli.compress import compress
from calibrant.cli.data import app as data_app
from calibrant.cli.demo import demo
from calibrant.cli.evaluate import evaluate
from calibrant.cli.gguf import gguf
from calibrant.cli.imatrix import imatrix
from calibrant.cli.prove import prove
from calibrant.cli.recipes import recipes
from calibrant.cli.report import report
from calibrant.cli.status import status
from calibrant.cli.study import app as study_app
from calibrant.cli.wording import as_options
from calibrant.errors import CalibrantError
from calibrant.stopping import StoppedError

_USAGE, _INTERRUPTED = 2, 130
# Shells report a command that a signal ended as 128 plus the signal's number.
_SIGNALLED = 128

app = typer.Typer(
    name="calibrant",
    help="Calibration data and post-training compression for language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(compress)
app.command()(status)
app.add_typer(data_app, name="data")
app.command()(evaluate)
app.command()(report)
app.command()(compare)
app.command()(gguf)
app.command()(prove)
app.command()(imatrix)
app.add_typer(study_app, name="study")
app.command()(recipes)
app.command()(demo)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if version:
        import calibrant

        typer.echo(calibrant.__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; a user error prints one sentence and exits with status 2."""
    # SIGTERM and SIGHUP unwind the stack like any exit, so that staged output is removed.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(_SIGNALLED + received))
    try:
        app()
    except (CalibrantError, OSError) as error:
        print(f"{_name()}: {as_options(str(error), _options(sys.argv[1:]))}", file=sys.stderr)
        sys.exit(_USAGE)
    except StoppedError as stopped:
        from calibrant.ranks import Ranks

        if Ranks.joined().first:
            print(f"calibrant: {stopped}", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            print("calibrant: interrupted, no unfinished output was left behind", file=sys.stderr)
        raise


def _name() -> str:
    """How messages begin; of several processes that torchrun started each says its rank, since each may fail."""
    rank = os.environ.get("RANK") if "TORCHELASTIC_RUN_ID" in os.environ else None
    return "calibrant" if rank is None else f"calibrant, rank {rank}"


def _options(arguments: list[str]) -> set[str]:
    """The options of the command that ``arguments`` call."""
    command: Any = typer.main.get_command(app)
    for word in arguments:
        if not hasattr(command, "commands"):
            break
        command = command.commands.get(word, command)
    return {spelled for parameter in command.params for spelled in parameter.opts}
