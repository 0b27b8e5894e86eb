"""``calibrant report``."""

from pathlib import Path
from typing import Annotated

import typer

from calibrant.cli.console import DeviceOption, DtypeOption, JsonOption, QuietOption, terminal

OutputArgument = Annotated[Path, typer.Argument(help="Folder of a compressed model.", show_default=False)]


def report(
    folder: OutputArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; by default report.html in the folder.", show_default=False),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", help="Original model: also show what both models write after a few prompts."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Beginning of a text, in place of ours; may be repeated.")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a page about a compressed model: errors by layer, fallbacks, times, calibration data, samples.

    Example: calibrant report ./SmolLM2-w4 --against ./SmolLM2-135M
    """
    with terminal(quiet, as_json) as screen:
        import calibrant as cb

        written = cb.write_run_report(
            folder,
            output=output,
            against=against,
            prompts=prompt or (),
            device=device,
            dtype=dtype,
            progress=screen.progress,
        )
        screen.result({"report": str(written)}, str(written))
