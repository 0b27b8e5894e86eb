"""``calibrant data generate``."""

from typing import Annotated

import typer

from calibrant.cli.console import (
    DeviceOption,
    DrawOption,
    DtypeOption,
    FieldOption,
    JsonOption,
    ModelArgument,
    ModelLengthOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    SamplesOption,
    SeedOption,
    terminal,
)
from calibrant.cli.data.shared import save


def generate(
    model: ModelArgument,
    output: OutputOption,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help="self (the model writes from BOS), llm-qat (from random tokens), prefix (from the first tokens of a "
            "corpus's texts), vocabulary (random tokens).",
        ),
    ] = "self",
    samples: SamplesOption = 128,
    length: ModelLengthOption = None,
    seed: SeedOption = 0,
    draw: DrawOption = 0,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Temperature (after the first steps); 1 if left out.")
    ] = None,
    initial_temperature: Annotated[
        float | None,
        typer.Option("--initial-temperature", help="Temperature the schedule starts from; left out: no schedule."),
    ] = None,
    temperature_steps: Annotated[
        int | None,
        typer.Option("--temperature-steps", help="Steps from the initial temperature to the final one; 10."),
    ] = None,
    first_tokens: Annotated[
        str, typer.Option("--first-tokens", help="self: any, or english (for multilingual models).")
    ] = "any",
    corpus: Annotated[str | None, typer.Option("--corpus", help="prefix: whose texts' beginnings to continue.")] = None,
    field: FieldOption = "text",
    percentile: Annotated[
        float, typer.Option("--percentile", help="prefix: keep rows below this percentile of perplexity.")
    ] = 80.0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows generated at a time.")] = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a calibration set without any corpus.

    Example: calibrant data generate ./SmolLM2-135M -o ./set --samples 128 --length 512
    """
    with terminal(quiet, as_json) as screen:
        from calibrant.calibration.corpus import Corpus
        from calibrant.calibration.generate import generate as run
        from calibrant.calibration.sources.self_calibration import TemperatureSchedule
        from calibrant.errors import CalibrantError
        from calibrant.output_folder import check_output

        check_output(output, overwrite, [model] if corpus is None else [model, corpus])
        if temperature_steps is not None and initial_temperature is None:
            raise CalibrantError("--temperature-steps lead from an --initial-temperature: name it too")
        final = 1.0 if temperature is None else temperature
        schedule = None if temperature is None else TemperatureSchedule(final, final, 0)
        if initial_temperature is not None:
            schedule = TemperatureSchedule(
                initial_temperature, final, 10 if temperature_steps is None else temperature_steps
            )
        made = run(
            model,
            strategy=strategy,
            samples=samples,
            length=length,
            seed=seed,
            draw=draw,
            temperature=schedule,
            first_tokens=first_tokens,  # type: ignore[arg-type]  # checked by generate, which names the choices
            corpus=Corpus(corpus, field) if corpus is not None else None,
            percentile=percentile,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            progress=screen.progress,
        )
        save(made, output, overwrite, screen)
