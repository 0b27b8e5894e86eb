"""``calibrant compress``."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calibrant.cli.console import (
    DequantizeOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    ModelLengthOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    terminal,
)
from calibrant.report.tables import size_text
from calibrant.stopping import stopping_gently

if TYPE_CHECKING:
    from rich.table import Table

    from calibrant import PreparedRun, RunReport
    from calibrant.cli.console import Terminal

_WORST_LAYERS = 5
_MOST_NOTES = 10
_SHOWN_SECONDS = 0.05


def compress(
    model: ModelArgument,
    output: OutputOption,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Name of a recipe (see `calibrant recipes`), or a YAML file.")
    ] = "gptq-w4a16",
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", "-c", help="Calibration set folder; by default the model generates a set."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", help="Rows of the set that the model generates; by default 128.")
    ] = None,
    length: ModelLengthOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the set that the model generates, and of training.")] = 0,
    draw: Annotated[
        int | None,
        typer.Option("--draw", help="Number of that set among the independent sets of one seed; by default 0."),
    ] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="Bits per weight; overrides the recipe.")] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Group size; overrides the recipe. 0: one scale per channel.")
    ] = None,
    order: Annotated[
        str,
        typer.Option(
            "--order",
            help="sequential (solve each layer on inputs from the compressed layers before it), two-pass (collect a "
            "block's statistics, solve it, then run it again, as other tools do: twice the forward passes) or "
            "independent (every block gets the original model's hidden states).",
        ),
    ] = "sequential",
    checkpoint_format: Annotated[
        str, typer.Option("--format", help="Format of quantized weights: compressed-tensors, gptq, awq or gguf.")
    ] = "compressed-tensors",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    encoder: Annotated[
        bool, typer.Option("--encoder", help="Allow models that are not causal (BERT classifiers).")
    ] = False,
    dequantize: DequantizeOption = False,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            help="Memory that the run may use, such as 6GB; by default all that is free. Hidden states that do not fit "
            "are kept in files, with the same result. A model that does not fit cannot write its calibration set: "
            "without -c, the built-in corpus takes its place.",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print an estimate of time, memory and disk, and stop.")
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compress a model: generate or read calibration data, solve block by block, write, verify and report.

    Without -c the model generates the calibration set; --samples, --length, --seed and --draw describe it.

    Ctrl-C stops after the current block. The same command continues from there, also after a crash; `calibrant status`
    shows where a run is.

    Several processes share the rows of the set: torchrun --nproc-per-node 2 -m calibrant compress ...

    Example: calibrant compress ./SmolLM2-135M -r gptq-w4a16-g64 -o ./SmolLM2-w4
    """
    import calibrant as cb
    from calibrant.ranks import Ranks

    first = Ranks.joined().first
    with terminal(quiet or not first, as_json and first) as screen:
        prepared = cb.prepare(
            model,
            output=output,
            recipe=recipe,
            bits=bits,
            group_size=group_size,
            calibration=calibration,
            samples=samples,
            length=length,
            seed=seed,
            draw=draw,
            device=device,
            dtype=dtype,
            order=order,  # type: ignore[arg-type]  # checked by prepare, which names the choices
            checkpoint_format=checkpoint_format,  # type: ignore[arg-type]  # likewise
            overwrite=overwrite,
            allow_encoder=encoder,
            dequantize=dequantize,
            memory=memory,
        )
        for note in prepared.plan.notes:
            screen.note(f"note: {note}")
        if not prepared.recipe.needs_data:
            given = {"calibration": calibration, "samples": samples, "length": length, "draw": draw}
            ignored = ", ".join(f"--{name}" for name, value in given.items() if value is not None)
            if ignored:
                screen.note(f"note: {prepared.recipe.name} uses no data; ignored: {ignored}")
        if dry_run:
            for note in prepared.memory_notes():
                screen.note(f"note: {note}")
            _show_estimate(screen, model, prepared)
            return
        with stopping_gently(screen.note):
            report = prepared.run(screen.progress)
        _tell(screen, [text for text in report.notes if text not in prepared.plan.notes])
        screen.result(report.as_dict(), *summary(report))
        if not encoder and not dequantize:
            compared = f"{shlex.quote(str(report.output))} --against {shlex.quote(model)}"
            screen.note(f"next: calibrant evaluate {compared} --limit 16 --text HELD_OUT.txt")


def _show_estimate(screen: "Terminal", model: str, prepared: "PreparedRun") -> None:
    import psutil

    starting = time.time() - psutil.Process().create_time()  # imports and checks, which the run repeats
    found = prepared.estimate()
    least, most = (seconds + starting for seconds in found.seconds_range)
    lines = {
        "model": model,
        "recipe": prepared.recipe.name,
        "layers": len(prepared.plan.layers),
        "share": prepared.plan.share,
        "seconds": [round(least), round(most)],
        "memory_bytes": found.memory_bytes,
        "output_bytes": found.output_bytes,
        "disk_bytes": found.disk_bytes,
        "hidden_states": "disk" if found.on_disk else "memory",
    }
    screen.result(
        lines,
        f"{lines['layers']} layers of {model} by {lines['recipe']}, {prepared.plan.share:.1%} of the blocks' weights: "
        f"about {time_text(least, most)}"
        + (
            f" ({time_text(*found.writing_range)} of them to generate the calibration set)"
            if prepared.writes_set
            else ""
        )
        + f", {size_text(found.memory_bytes)} of memory, an output of {size_text(found.output_bytes)}"
        f" ({size_text(found.disk_bytes)} of disk while it runs"
        + (", where the hidden states are kept)" if found.on_disk else ")"),
    )


def time_text(least: float, most: float) -> str:
    """A range of seconds in the unit that suits it, such as "2 to 3 minutes"."""
    units = ((3600, "hour"), (60, "minute"), (0, "second"))
    unit, name = next((max(1, size), name) for size, name in units if most >= 3 * size)
    low, high = max(1, round(least / unit)), max(1, round(most / unit))
    numbers = f"{low} to {high}" if low < high else str(high)
    return f"{numbers} {name}" + ("s" if high > 1 else "")


def _tell(screen: "Terminal", notes: list[str]) -> None:
    """Show the first ``_MOST_NOTES`` notes, then the number of the others."""
    for text in notes[:_MOST_NOTES]:
        screen.note(f"note: {text}")
    if len(notes) > _MOST_NOTES:
        screen.note(f"note: {len(notes) - _MOST_NOTES} more are in calibrant.json")


def summary(report: "RunReport") -> "list[Table | str]":
    """Sizes, times and the notable layers of a run as a table."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{report.output} ({report.recipe})"), show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("compressed", f"{report.share:.1%} of the blocks' weights")
    table.add_row("size", f"{size_text(report.bytes_before)} before, {size_text(report.bytes_after)} after")
    stages = ", ".join(
        f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items() if seconds >= _SHOWN_SECONDS
    )
    table.add_row("time", f"{sum(report.seconds.values()):.1f} s: {stages}")
    table.add_row("peak memory", f"{size_text(report.peak_memory_bytes)} (of the whole process)")
    if report.layers:
        worst = sorted(report.layers, key=lambda layer: -layer.relative_error)[:_WORST_LAYERS]
        lines = "\n".join(f"{layer.name}  relative error {layer.relative_error:.3g}" for layer in worst)
        table.add_row("worst layers", lines)
        fallbacks = "\n".join(f"{layer.name}: {layer.record.fallback}" for layer in report.fallbacks)
        table.add_row("fell back", fallbacks or "none")
        raised = [layer for layer in report.layers if layer.record.damping_raised]
        table.add_row("damping raised", f"{len(raised)} layers")
        table.add_row("dead columns", str(sum(layer.record.dead_columns for layer in report.layers)))
    table.add_row("verified", f"{report.tensors_verified} tensors read back, equal to the solved ones")
    return [table]
