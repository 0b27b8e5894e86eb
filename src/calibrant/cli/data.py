"""``calibrant data``: generate, select, inspect."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibrant.cli.console import (
    DeviceOption,
    DrawOption,
    DtypeOption,
    FieldOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    ModelLengthOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    SamplesOption,
    SeedOption,
    Terminal,
    terminal,
)

if TYPE_CHECKING:
    from calibrant.calibration.calibration_set import CalibrationSet
    from calibrant.calibration.tokenizer import Tokenizer

app = typer.Typer(help="Make, choose and look at calibration sets.", no_args_is_help=True, rich_markup_mode="markdown")


@app.command()
def generate(
    model: ModelArgument,
    output: OutputOption,
    strategy: Annotated[
        str, typer.Option("--strategy", help="self (the model writes) or vocabulary (random tokens).")
    ] = "self",
    samples: SamplesOption = 128,
    length: ModelLengthOption = None,
    seed: SeedOption = 0,
    draw: DrawOption = 0,
    temperature: Annotated[float, typer.Option("--temperature", help="Temperature after the first steps.")] = 1.0,
    initial_temperature: Annotated[
        float | None,
        typer.Option("--initial-temperature", help="Temperature the schedule starts from; left out: no schedule."),
    ] = None,
    temperature_steps: Annotated[
        int, typer.Option("--temperature-steps", help="Steps from the initial temperature to the final one.")
    ] = 10,
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
        from calibrant.api import generate as run
        from calibrant.calibration.sources.self_calibration import TemperatureSchedule
        from calibrant.output_folder import check_output

        check_output(output, overwrite, [model])
        schedule = TemperatureSchedule(temperature, temperature, 0)
        if initial_temperature is not None:
            schedule = TemperatureSchedule(initial_temperature, temperature, temperature_steps)
        made = run(
            model,
            strategy=strategy,
            samples=samples,
            length=length,
            seed=seed,
            draw=draw,
            temperature=schedule,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            progress=screen.progress,
        )
        _save(made, output, overwrite, screen)


@app.command()
def select(
    corpus: Annotated[
        str,
        typer.Argument(
            help="File (.txt, .jsonl, .parquet, or .gz of these), folder, hub:owner/name or builtin.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model folder whose tokenizer is used.", show_default=False)
    ],
    output: OutputOption,
    strategy: Annotated[str, typer.Option("--strategy", help="How documents are chosen: uniform.")] = "uniform",
    windows: Annotated[
        str, typer.Option("--windows", help="pack (join documents, cut) or window (one of each long enough document).")
    ] = "pack",
    field: FieldOption = "text",
    samples: SamplesOption = 128,
    length: LengthOption = 512,
    seed: SeedOption = 0,
    draw: DrawOption = 0,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Pick a calibration set out of a corpus.

    Example: calibrant data select c4.jsonl.gz -m ./SmolLM2-135M -o ./set
    """
    with terminal(quiet, as_json) as screen:
        from calibrant.api import select as run
        from calibrant.calibration.corpus import Corpus
        from calibrant.output_folder import check_output

        check_output(output, overwrite, [corpus, model])
        made = run(
            Corpus(corpus, field),
            tokenizer=model,
            strategy=strategy,
            samples=samples,
            length=length,
            seed=seed,
            draw=draw,
            windows=windows,  # type: ignore[arg-type]  # checked by select, which names the choices
            progress=screen.progress,
        )
        _save(made, output, overwrite, screen)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Calibration set folder.", show_default=False)],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model folder, to show the rows as text.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Rows to show as text.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Show what is in a calibration set.

    Example: calibrant data inspect ./set -m ./SmolLM2-135M
    """
    with terminal(quiet=False, as_json=as_json) as screen:
        from calibrant.calibration.calibration_set import CalibrationSet
        from calibrant.calibration.tokenizer import Tokenizer
        from calibrant.errors import CalibrantError

        loaded = CalibrationSet.load(folder)
        texts = []
        if model is not None:
            tokenizer = Tokenizer(model)
            if tokenizer.sha256 != loaded.manifest.tokenizer_sha256:
                raise CalibrantError(f"{folder}: was made with another tokenizer than {model}'s")
            texts = [_readable(tokenizer, row.tolist()) for row in loaded.tokens[:rows]]
        _show(loaded, texts, screen)


def _readable(tokenizer: "Tokenizer", ids: list[int]) -> str:
    """Text of a row; a model's embedding may hold more ids than its tokenizer knows."""
    known = [index for index in ids if 0 <= index < tokenizer.size]
    unknown = len(ids) - len(known)
    return tokenizer.decode(known) + (f"\n({unknown} ids that the tokenizer does not know)" if unknown else "")


def _save(made: "CalibrationSet", output: Path, overwrite: bool, screen: Terminal) -> None:
    from calibrant.output_folder import staged

    with staged(output, overwrite) as folder:
        made.save(folder)
    _show(made, [], screen, output)


def _show(loaded: "CalibrationSet", texts: list[str], screen: Terminal, output: Path | None = None) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from calibrant.calibration.text_statistics import token_statistics

    manifest, found = loaded.manifest, token_statistics(loaded)
    facts: dict[str, Any] = {
        "strategy": manifest.strategy,
        "samples": manifest.samples,
        "length": manifest.length,
        "seed": manifest.seed,
        "draw": manifest.draw,
        "parameters": manifest.parameters,
        "corpus": manifest.corpus,
        **manifest.counts,
        **found,
        "set_sha256": manifest.set_sha256,
    }
    table = Table(title=Text(str(output)) if output else None, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value is not None:
            table.add_row(name, Text(f"{value:.4f}" if isinstance(value, float) else str(value)))
    panels = [Panel(Text(text), title=f"row {index}") for index, text in enumerate(texts)]
    screen.result({**facts, **({"rows": texts} if texts else {})}, table, *panels)
