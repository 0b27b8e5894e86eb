"""Code shared by the ``data`` commands: the embedding option, lists of numbers, saving and showing a set."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibrant.cli.console import Terminal

if TYPE_CHECKING:
    from calibrant import CalibrationSet

EmbeddingOption = Annotated[
    str, typer.Option("--embedding", help="lexical (needs no model), or the folder of a sentence-transformers model.")
]


def numbers(option: str, text: str | None) -> list[float] | None:
    """The numbers in an option's value, such as 2,1,1.

    Raises:
        CalibrantError: the value is not a list of numbers.
    """
    import calibrant as cb

    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise cb.CalibrantError(f"{option} {text}: not a list of numbers separated by commas, such as 2,1,1") from error


def save(made: "CalibrationSet", output: Path, overwrite: bool, screen: Terminal) -> None:
    """Write a set to ``output``, completely or not at all, and show its manifest's main entries."""
    made.save(output, overwrite=overwrite)
    show(made, screen, output)


def show(made: "CalibrationSet", screen: Terminal, output: Path) -> None:
    """Show the main entries of the manifest of a set that is saved in ``output``."""
    from rich.table import Table
    from rich.text import Text

    from calibrant.report.inspection import set_facts

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
    for name, value in set_facts(manifest).items():
        table.add_row(name, Text(value))
    screen.result({**facts, "corpora": manifest.corpora}, table)
