"""``calibrant data rebuild``."""

from pathlib import Path
from typing import Annotated

import typer

from calibrant.cli.console import JsonOption, OutputOption, OverwriteOption, QuietOption, terminal
from calibrant.cli.data.shared import save


def rebuild(
    manifest: Annotated[Path, typer.Argument(help="Manifest, or folder of the set.", show_default=False)],
    output: OutputOption,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model, if it is not where the manifest says.")
    ] = None,
    corpus: Annotated[
        list[str] | None, typer.Option("--corpus", help="The corpus, if it is not where the manifest says.")
    ] = None,
    leakage: Annotated[
        list[str] | None, typer.Option("--leakage", help="Evaluation text, if it is not where the manifest says.")
    ] = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a calibration set again, byte for byte, from its manifest; say what changed where that fails.

    Example: calibrant data rebuild ./set/manifest.json -o ./again
    """
    with terminal(quiet, as_json) as screen:
        from calibrant.calibration.rebuild import rebuild as run
        from calibrant.output_folder import check_output

        check_output(output, overwrite, [manifest])
        again = run(manifest, model=model, corpora=corpus, leakage=leakage, progress=screen.progress)
        for change in again.changes:
            screen.note(f"changed, without effect on the tokens: {change}")
        save(again.calibration, output, overwrite, screen)
