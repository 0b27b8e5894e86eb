"""``calibrant data mix``."""

from pathlib import Path
from typing import Annotated

import typer

from calibrant.cli.console import JsonOption, OutputOption, OverwriteOption, QuietOption, terminal
from calibrant.cli.data.shared import numbers, save


def mix(
    folders: Annotated[
        list[Path], typer.Argument(help="Calibration set folders, of one tokenizer and length.", show_default=False)
    ],
    output: OutputOption,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Shares of the sets, such as 2,1,1; equal by default.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", "-n", help="Number of rows; by default until a set has no row left for its turn."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Take each set's rows in random order; by default in their own.")
    ] = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Mix the rows of calibration sets: they take turns in proportion to their shares.

    Example: calibrant data mix ./self ./c4 -o ./mixed --weights 3,1 --samples 128
    """
    with terminal(quiet, as_json) as screen:
        import calibrant as cb
        from calibrant.output_folder import check_output

        check_output(output, overwrite, folders)
        made = cb.mix_sets(folders, weights=numbers("--weights", weights), samples=samples, seed=seed)
        save(made, output, overwrite, screen)
