"""``calibrant status``."""

from pathlib import Path
from typing import Annotated

import typer

from calibrant.cli.console import JsonOption, terminal


def status(
    output: Annotated[
        Path, typer.Argument(help="Output folder of compress, data generate or data select.", show_default=False)
    ],
    as_json: JsonOption = False,
) -> None:
    """Show the state of the run that writes to a folder: running, interrupted (after which block), or finished.

    Example: calibrant status ./SmolLM2-w4
    """
    with terminal(False, as_json) as screen:
        import calibrant as cb

        found = cb.status(output)
        screen.result(found.as_dict(), found.sentence())
