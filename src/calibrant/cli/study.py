"""``calibrant study``: plan, run, show, report, export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calibrant.cli.compress import time_text
from calibrant.cli.console import JsonOption, OutputOption, QuietOption, size_text, terminal

if TYPE_CHECKING:
    from rich.table import Table

    from calibrant import Analysis

app = typer.Typer(
    help="Studies: what did the calibration data do, over sources, draws, sizes and recipes.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

PlanArgument = Annotated[Path, typer.Argument(help="YAML file of the study.", show_default=False)]
StudyArgument = Annotated[Path, typer.Argument(help="Folder of the study.", show_default=False)]
CacheOption = Annotated[
    Path, typer.Option("--cache", help="Folder for sets, originals and results, which studies share.")
]
PairedOption = Annotated[
    bool, typer.Option("--paired", help="Compare sources draw by draw: their draws share documents.")
]
FolderOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder of the study; by default the study's name, beside its file."),
]
ExecutorOption = Annotated[
    str, typer.Option("--executor", help="local (processes of this machine) or ray (a Ray cluster).")
]
WorkersOption = Annotated[
    int, typer.Option("--workers", "-w", min=1, help="Processes that run cells, with --executor local.")
]
ProcessorsOption = Annotated[
    int, typer.Option("--processors", min=1, help="Processors of each cell, with --executor ray.")
]
DevicesOption = Annotated[int, typer.Option("--devices", min=0, help="GPUs of each cell, with --executor ray.")]
DEFAULT_CACHE = Path.home() / ".cache" / "calibrant" / "studies"
_MOST_FAILURES = 5


@app.command()
def plan(
    file: PlanArgument,
    cache: CacheOption = DEFAULT_CACHE,
    workers: WorkersOption = 1,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check a study, and print its number of cells and what it takes.

    Example: calibrant study plan studies/tiny.yaml
    """
    with terminal(quiet, as_json) as screen:
        from dataclasses import asdict

        import calibrant as cb

        found = cb.plan_study(file, cache=cache, workers=workers, progress=screen.progress)
        screen.result(
            asdict(found),
            f"{found.cells} cells, {found.done} of them done: {found.models} models, {found.recipes} recipes, "
            f"{found.sources} sources, {found.draws} draws",
            f"left: about {time_text(*found.seconds)}, and the time to make {found.sets} sets; "
            f"{size_text(found.memory_bytes)} of memory, {size_text(found.disk_bytes)} of disk",
        )


@app.command()
def run(
    file: PlanArgument,
    output: FolderOption = None,
    cache: CacheOption = DEFAULT_CACHE,
    executor: ExecutorOption = "local",
    workers: WorkersOption = 1,
    processors: ProcessorsOption = 1,
    devices: DevicesOption = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run the cells of a study that have no results yet, then write its report. Stopped, the same command goes on.

    Example: calibrant study run studies/tiny.yaml
    """
    with terminal(quiet, as_json) as screen:
        from dataclasses import asdict

        import calibrant as cb

        ran = cb.run_study(
            file,
            output=output,
            cache=cache,
            executor=executor,  # type: ignore[arg-type]  # checked by run_study, which names the choices
            workers=workers,
            processors=processors,
            devices=devices,
            progress=screen.progress,
        )
        failures = [{**asdict(one.cell), "error": one.error} for one in ran.failures]
        try:
            page: str | None = str(cb.Study(ran.folder).report())
        except cb.CalibrantError as error:  # the results are there; the page can be made at any time
            page = None
            screen.note(f"no report: {error}")
        screen.result(
            {"folder": str(ran.folder), "cells": ran.cells, "failures": failures, "report": page},
            *_failure_lines(failures),
            f"{ran.cells - len(failures)} of {ran.cells} cells are done: calibrant study show {ran.folder}",
            *([f"report: {page}"] if page else []),
        )
        if failures:
            raise typer.Exit(1)


@app.command()
def recommend(
    file: PlanArgument,
    measure: Annotated[str, typer.Option("--measure", help="What decides: kl, perplexity, acc, ...")] = "kl",
    on: Annotated[
        str | None, typer.Option("--on", help="Text or task that it is measured on; by default the first.")
    ] = None,
    budget: Annotated[int, typer.Option("--budget", min=1, help="Most cells to run.")] = 60,
    smallest_difference: Annotated[
        float, typer.Option("--smallest-difference", min=0, help="Differences up to this do not matter.")
    ] = 0.0,
    output: FolderOption = None,
    cache: CacheOption = DEFAULT_CACHE,
    executor: ExecutorOption = "local",
    workers: WorkersOption = 1,
    processors: ProcessorsOption = 1,
    devices: DevicesOption = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say which source to take, after just enough cells: sources that are worse get no more draws.

    Example: calibrant study recommend studies/which.yaml --budget 30
    """
    with terminal(quiet, as_json) as screen:
        from dataclasses import asdict

        import calibrant as cb

        found = cb.recommend_source(
            file,
            measure=measure,
            on=on,
            budget=budget,
            smallest_difference=smallest_difference,
            output=output,
            cache=cache,
            executor=executor,  # type: ignore[arg-type]  # checked by recommend_source, which names the choices
            workers=workers,
            processors=processors,
            devices=devices,
            progress=screen.progress,
        )
        screen.result({"sentence": found.sentence, **asdict(found)}, found.sentence)


@app.command()
def show(
    folder: StudyArgument,
    paired: PairedOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Print what a study found: scores by source, and how much of their spread the source explains.

    Example: calibrant study show studies/tiny
    """
    with terminal(quiet, as_json) as screen:
        import calibrant as cb

        study = cb.Study(folder)
        counts = study.counts()
        if counts["failed"] or counts["waiting"]:
            screen.note(f"{counts['done']} cells done, {counts['failed']} failed, {counts['waiting']} waiting")
        again = len(study.same_sets())
        if again:
            screen.note(f"{again} cells are left out: their set is that of an earlier draw or seed of their source")
        found = study.analyse(paired=paired)
        screen.result(found.as_json(), *tables(found))


@app.command()
def report(
    folder: StudyArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; by default the study's.", show_default=False)
    ] = None,
    paired: PairedOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write what a study found as one HTML page that works offline, and its tables as CSV, Markdown and LaTeX.

    Example: calibrant study report studies/tiny
    """
    with terminal(quiet, as_json) as screen:
        import calibrant as cb

        written = str(cb.Study(folder).report(output, paired=paired))
        screen.result({"report": written}, written)


@app.command()
def export(
    folder: StudyArgument,
    output: OutputOption,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a study's cells, scores and items as Parquet and CSV.

    Example: calibrant study export studies/tiny -o tables
    """
    with terminal(quiet, as_json) as screen:
        import calibrant as cb

        written = [str(path) for path in cb.Study(folder).export(output)]
        screen.result({"files": written}, "\n".join(written))


def tables(found: "Analysis") -> "list[Table | str]":
    """One table of sources for every model, recipe, size, measure and text, and the finding in a sentence."""
    from rich.table import Table
    from rich.text import Text

    shown: list[Table | str] = []
    for setting in found.settings:
        where = setting.setting
        title = f"{where.measure}{' on ' + where.on if where.on else ''}: {where.model}, {where.recipe}, "
        table = Table(title=Text(title + f"{where.samples} x {where.length}"))
        for column in ("source", "draws", "mean", "95 %", "sd", "range"):
            table.add_column(column, justify="left" if column == "source" else "right")
        for source in setting.sources:
            one = source.description
            interval = "" if one.interval is None else f"[{one.interval.low:.4g}, {one.interval.high:.4g}]"
            sd = "" if one.sd is None else f"{one.sd:.2g}"
            table.add_row(source.source, str(one.n), f"{one.mean:.4g}", interval, sd, f"{one.range:.2g}")
        shown += [table, setting.headline, ""]
    return shown


def _failure_lines(failures: list[dict[str, object]]) -> list[str]:
    lines = [
        f"failed: {one['model']}, {one['recipe']}, {one['source']}, draw {one['draw']}, {one['samples']} x "
        f"{one['length']}: {one['error']}"
        for one in failures[:_MOST_FAILURES]
    ]
    more = len(failures) - len(lines)
    return lines + ([f"and {more} more, in the table cells of study.sqlite"] if more else [])
