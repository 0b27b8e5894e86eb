"""``calibrant imatrix``."""

from pathlib import Path
from typing import Annotated

import typer

from calibrant.cli.console import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    terminal,
)


def imatrix(
    model: ModelArgument,
    calibration: Annotated[Path, typer.Option("--calibration", "-c", help="Calibration set folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="GGUF file to write.")],
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it exists.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an importance matrix for llama.cpp's quantizer (llama-quantize --imatrix) from a calibration set.

    Example: calibrant imatrix ./SmolLM2-135M -c ./covering -o imatrix.gguf
    """
    with terminal(quiet, as_json) as screen:
        import calibrant as cb

        written = cb.write_importance_matrix(
            model,
            calibration=calibration,
            output=output,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            progress=screen.progress,
        )
        layers, left_out = len(written.tensors), written.left_out
        screen.result(
            {"output": str(output), "layers": layers, "left_out": left_out, "architecture": written.architecture},
            f"{output}: {layers} layers" + (f", {len(left_out)} left out" if left_out else ""),
        )
