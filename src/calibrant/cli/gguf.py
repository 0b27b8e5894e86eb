"""``calibrant gguf``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from calibrant.cli.console import JsonOption, QuietOption, terminal
from calibrant.report.tables import size_text


def gguf(
    model: Annotated[str, typer.Argument(help="Compressed or original model: a folder, or hub:owner/name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="GGUF file to write.", show_default=False)],
    embeddings: Annotated[
        Literal["Q8_0", "Q6_K", "Q5_0", "Q4_K", "Q4_0", "stored"],
        typer.Option(
            "--embeddings", case_sensitive=False, help="Type of embeddings and output matrix; stored: as they are."
        ),
    ] = "Q8_0",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it exists.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a compressed model as a GGUF file, which llama.cpp runs, without loss of its codes.

    Example: calibrant gguf ./w4 -o w4.gguf
    """
    with terminal(quiet, as_json) as screen:
        from dataclasses import asdict

        import calibrant as cb

        written = cb.write_gguf(
            model, output=output, embeddings=embeddings, overwrite=overwrite, progress=screen.progress
        )
        types = ", ".join(f"{count} {kind}" for kind, count in sorted(written.types.items()))
        screen.result(
            {"output": str(output), **asdict(written)},
            f"{output}: {size_text(written.bytes)}, {written.architecture}; tensors: {types}",
        )
