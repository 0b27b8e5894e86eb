"""What the commands about sets share: an option, lists of numbers, saving a set and saying what it is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibrant.cli.console import Terminal

if TYPE_CHECKING:
    from calibrant.calibration.calibration_set import CalibrationSet

EmbeddingOption = Annotated[
    str, typer.Option("--embedding", help="lexical (no model), or a sentence-transformers model's folder.")
]


def numbers(option: str, text: str | None) -> list[float] | None:
    """The numbers of an option's value like 2,1,1.

    Raises:
        CalibrantError: they are none.
    """
    from calibrant.errors import CalibrantError

    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise CalibrantError(f"{option} {text}: numbers with commas between are expected, like 2,1,1") from error


def save(made: "CalibrationSet", output: Path, overwrite: bool, screen: Terminal) -> None:
    """Write a set to ``output``, whole or not at all, and show what it is."""
    from calibrant.output_folder import staged

    with staged(output, overwrite) as folder:
        made.save(folder)
    _show(made, screen, output)


def _show(made: "CalibrationSet", screen: Terminal, output: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    manifest = made.manifest
    facts: dict[str, Any] = {
        "strategy": manifest.strategy,
        "samples": manifest.samples,
        "length": manifest.length,
        "seed": manifest.seed,
        "draw": manifest.draw,
        "parameters": manifest.parameters,
        **manifest.counts,
        "set_sha256": manifest.set_sha256,
    }
    table = Table(title=Text(str(output)), show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(str(value)))
    screen.result({**facts, "corpora": manifest.corpora}, table)
