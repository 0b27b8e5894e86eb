"""``calibrant compress``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calibrant.cli.console import (
    DeviceOption,
    DrawOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    ModelLengthOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    SamplesOption,
    SeedOption,
    size_text,
    terminal,
)

if TYPE_CHECKING:
    from rich.table import Table

    from calibrant.cli.console import Terminal
    from calibrant.pipeline.record import RunReport

_WORST_LAYERS = 5
_MOST_NOTES = 10


def compress(
    model: ModelArgument,
    output: OutputOption,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Recipe by name (see `calibrant recipes`) or a YAML file.")
    ] = "gptq-w4a16",
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", "-c", help="Calibration set folder; left out, the model writes its own."),
    ] = None,
    samples: SamplesOption = 128,
    length: ModelLengthOption = None,
    seed: SeedOption = 0,
    draw: DrawOption = 0,
    bits: Annotated[int | None, typer.Option("--bits", help="Weight bits instead of the recipe's.")] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Group size instead of the recipe's; 0: one scale a channel.")
    ] = None,
    two_pass: Annotated[
        bool,
        typer.Option("--two-pass", help="Collect statistics, then propagate, as other tools do: twice the forwards."),
    ] = False,
    propagate: Annotated[
        bool,
        typer.Option(
            "--propagate/--no-propagate", help="Feed each block the outputs of the compressed ones before it."
        ),
    ] = True,
    checkpoint_format: Annotated[
        str, typer.Option("--format", help="How quantized weights are stored: compressed-tensors, gptq or awq.")
    ] = "compressed-tensors",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    encoder: Annotated[
        bool, typer.Option("--encoder", help="Allow models that are not causal (BERT classifiers).")
    ] = False,
    overwrite: OverwriteOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan and an estimate, stop.")
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compress a model: make or read calibration data, solve block by block, write, verify, report.

    --samples, --length, --seed and --draw shape the set that the model writes when no -c is given; --seed is also that
    of a training whose recipe says none.

    Example: calibrant compress ./SmolLM2-135M -r gptq-w4a16-g64 -o ./SmolLM2-w4
    """
    with terminal(quiet, as_json) as screen:
        from calibrant.api import prepare
        from calibrant.calibration.calibration_set import CalibrationSet
        from calibrant.calibration.generate import generate
        from calibrant.output_folder import check_output
        from calibrant.pipeline.record import report_dict
        from calibrant.recipes.recipe import load_recipe

        chosen = load_recipe(recipe).with_seed(seed).with_weights(bits, group_size)
        check_output(output, overwrite, [place for place in (model, calibration, recipe) if place is not None])
        given = CalibrationSet.load(calibration) if calibration is not None else None
        prepared = prepare(
            model,
            output=output,
            recipe=chosen,
            calibration=given,
            device=device,
            dtype=dtype,
            sequential=not two_pass,
            propagate=propagate,
            checkpoint_format=checkpoint_format,  # type: ignore[arg-type]  # checked by prepare, which names the choices
            overwrite=overwrite,
            allow_encoder=encoder,
        )
        for note in prepared.plan.notes:
            screen.note(f"note: {note}")
        if given is not None and not chosen.needs_data:
            screen.note(f"note: {chosen.name} uses no data, the calibration set is left out")
        if dry_run:
            made = given.manifest if given is not None else None
            estimate = prepared.estimate(made.samples if made else samples, made.length if made else length)
            lines = {
                "model": model,
                "recipe": prepared.plan.recipe.name,
                "layers": len(prepared.plan.linears) + len(prepared.plan.fused),
                "seconds": round(estimate.seconds),
                "memory_bytes": estimate.memory_bytes,
                "disk_bytes": estimate.disk_bytes,
            }
            screen.result(
                lines,
                f"{lines['layers']} layers of {model} by {lines['recipe']}: about {lines['seconds']} s"
                + ("" if given or not chosen.needs_data else " and the time to write the calibration set")
                + f", {size_text(estimate.memory_bytes)} of memory, {size_text(estimate.disk_bytes)} of disk",
            )
            return
        if given is None and chosen.needs_data:
            given = generate(
                model,
                samples=samples,
                length=length,
                seed=seed,
                draw=draw,
                device=device,
                dtype=dtype,
                progress=screen.progress,
            )
        report = prepared.run(given if chosen.needs_data else None, screen.progress)
        _tell(screen, [text for text in report.notes if text not in prepared.plan.notes])
        screen.result(report_dict(report), *summary(report))


def _tell(screen: "Terminal", notes: list[str]) -> None:
    """What became clear during the run; the first of many."""
    for text in notes[:_MOST_NOTES]:
        screen.note(f"note: {text}")
    if len(notes) > _MOST_NOTES:
        screen.note(f"note: {len(notes) - _MOST_NOTES} more are in calibrant.json")


def summary(report: "RunReport") -> "list[Table | str]":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{report.output} ({report.recipe})"), show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("size", f"{size_text(report.bytes_before)} before, {size_text(report.bytes_after)} after")
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    table.add_row("time", f"{sum(report.seconds.values()):.1f} s: {stages}")
    table.add_row("peak memory", f"{size_text(report.peak_memory_bytes)} (of the process so far)")
    if report.layers:
        worst = sorted(report.layers, key=lambda layer: -layer.relative_error)[:_WORST_LAYERS]
        lines = "\n".join(f"{layer.name}  relative error {layer.relative_error:.3g}" for layer in worst)
        table.add_row("worst layers", lines)
        fallbacks = "\n".join(f"{layer.name}: {layer.record.fallback}" for layer in report.fallbacks)
        table.add_row("fell back", fallbacks or "none")
        raised = [layer for layer in report.layers if layer.record.damping_raised]
        table.add_row("damping raised", f"{len(raised)} layers")
        table.add_row("dead columns", str(sum(layer.record.dead_columns for layer in report.layers)))
    table.add_row("verified", f"{report.tensors_verified} tensors read back, equal to what was solved")
    return [table]
