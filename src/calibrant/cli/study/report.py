"""``calibrant study report``."""

from pathlib import Path
from typing import Annotated

import typer

from calibrant.cli.console import JsonOption, QuietOption, terminal
from calibrant.cli.study.shared import PairedOption, StudyArgument


def report(
    folder: StudyArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; by default the study's.", show_default=False)
    ] = None,
    paired: PairedOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write what a study found as one HTML page that works offline, and its tables as CSV, Markdown and LaTeX.

    Example: calibrant study report studies/tiny
    """
    with terminal(quiet, as_json) as screen:
        import calibrant as cb

        written = str(cb.Study(folder).report(output, paired=paired))
        screen.result({"report": written}, written)
