"""``calibrant data rebuild``."""

from pathlib import Path
from typing import Annotated

import typer

from calibrant.cli.console import JsonOption, OutputOption, OverwriteOption, QuietOption, terminal
from calibrant.cli.data.shared import save


def rebuild(
    manifest: Annotated[Path, typer.Argument(help="Manifest file, or the folder of the set.", show_default=False)],
    output: OutputOption,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model folder, if it has moved since the manifest was written.")
    ] = None,
    corpus: Annotated[
        list[str] | None, typer.Option("--corpus", help="Corpus, if it has moved; repeat for several, in their order.")
    ] = None,
    leakage: Annotated[
        list[str] | None, typer.Option("--leakage", help="Evaluation text, if it has moved; repeat for several.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option("--target", help="Target text of acdm, if it has moved; repeat for several.")
    ] = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Rebuild a calibration set byte for byte from its manifest; if that fails, report what has changed.

    Example: calibrant data rebuild ./set/manifest.json -o ./again
    """
    with terminal(quiet, as_json) as screen:
        import calibrant as cb
        from calibrant.output_folder import check_output

        check_output(output, overwrite, [manifest])
        again = cb.rebuild(
            manifest, model=model, corpora=corpus, leakage=leakage, targets=target, progress=screen.progress
        )
        for change in again.changes:
            screen.note(f"changed, without effect on the tokens: {change}")
        save(again.calibration, output, overwrite, screen)
        screen.note("the tokens are those of the manifest, byte for byte")
