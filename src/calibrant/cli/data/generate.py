"""``calibrant data generate``."""

from typing import Annotated

import typer

from calibrant.cli.console import (
    DequantizeOption,
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
from calibrant.cli.data.shared import show
from calibrant.stopping import stopping_gently


def generate(
    model: ModelArgument,
    output: OutputOption,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help="self (the model generates from BOS), llm-qat (from random tokens), prefix (from the beginnings of a "
            "corpus's documents), answers (it answers a corpus's prompts through its chat template), vocabulary "
            "(random tokens).",
        ),
    ] = "self",
    samples: SamplesOption = 128,
    length: ModelLengthOption = None,
    seed: SeedOption = 0,
    draw: DrawOption = 0,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            help="self, answers: final temperature, T_final of arXiv 2410.17170 section 3.2; 1 by default.",
        ),
    ] = None,
    initial_temperature: Annotated[
        float | None,
        typer.Option(
            "--initial-temperature",
            help="self, answers: initial temperature, T_init of arXiv 2410.17170 section 3.2; by default the "
            "temperature is constant.",
        ),
    ] = None,
    temperature_steps: Annotated[
        int | None,
        typer.Option(
            "--temperature-steps",
            help="self, answers: steps from the initial to the final temperature, n of arXiv 2410.17170 section "
            "3.2; 10 by default.",
        ),
    ] = None,
    first_tokens: Annotated[
        str,
        typer.Option(
            "--first-tokens", help="self: first token of every text: any, or english (for multilingual models)."
        ),
    ] = "any",
    corpus: Annotated[
        str | None,
        typer.Option(
            "--corpus",
            help="prefix: corpus whose documents are continued; answers: corpus of prompts or conversations.",
        ),
    ] = None,
    field: FieldOption = "text",
    percentile: Annotated[
        float, typer.Option("--percentile", help="prefix: keep rows below this percentile of perplexity.")
    ] = 80.0,
    mask: Annotated[
        str,
        typer.Option("--mask", help="answers: tokens that count, all or assistant (those that the model wrote)."),
    ] = "all",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows per generated batch.")] = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    dequantize: DequantizeOption = False,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Generate a calibration set with the model, or from random tokens.

    If it is interrupted, the same command continues with the missing rows.

    Example: calibrant data generate ./SmolLM2-135M -o ./set --samples 128 --length 512
    """
    with terminal(quiet, as_json) as screen:
        import calibrant as cb
        from calibrant.output_folder import check_output

        check_output(output, overwrite, [model] if corpus is None else [model, corpus])  # before it is opened
        if temperature_steps is not None and initial_temperature is None:
            raise cb.CalibrantError("--temperature-steps needs --initial-temperature")
        final = 1.0 if temperature is None else temperature
        schedule = None if temperature is None else cb.TemperatureSchedule(final, final, 0)
        if initial_temperature is not None:
            schedule = cb.TemperatureSchedule(
                initial_temperature, final, 10 if temperature_steps is None else temperature_steps
            )
        with stopping_gently(screen.note):
            made = cb.generate(
                model,
                strategy=strategy,
                samples=samples,
                length=length,
                seed=seed,
                draw=draw,
                temperature=schedule,
                first_tokens=first_tokens,  # type: ignore[arg-type]  # checked by generate, which names the choices
                corpus=cb.Corpus(corpus, field) if corpus is not None else None,
                percentile=percentile,
                mask=mask,  # type: ignore[arg-type]  # likewise
                batch_size=batch_size,
                device=device,
                dtype=dtype,
                dequantize=dequantize,
                output=output,
                overwrite=overwrite,
                progress=screen.progress,
            )
        show(made, screen, output)
