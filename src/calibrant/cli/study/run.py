"""``calibrant study run``."""

import typer

from calibrant.cli.console import JsonOption, QuietOption, terminal
from calibrant.cli.study.shared import (
    CacheOption,
    DevicesOption,
    ExecutorOption,
    FolderOption,
    PlanArgument,
    ProcessorsOption,
    WorkersOption,
)
from calibrant.user_cache import STUDIES

_MOST_FAILURES = 5


def run(
    file: PlanArgument,
    output: FolderOption = None,
    cache: CacheOption = STUDIES,
    executor: ExecutorOption = "local",
    workers: WorkersOption = 1,
    processors: ProcessorsOption = 1,
    devices: DevicesOption = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run the cells of a study that have no results yet, then write its report.

    If it is stopped, the same command continues.

    Example: calibrant study run studies/tiny.yaml
    """
    with terminal(quiet, as_json) as screen:
        from dataclasses import asdict

        import calibrant as cb

        try:
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
        except KeyboardInterrupt:
            screen.note("finished cells are kept: the same command continues")
            raise
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


def _failure_lines(failures: list[dict[str, object]]) -> list[str]:
    lines = [
        f"failed: {one['model']}, {one['recipe']}, {one['source']}, draw {one['draw']}, {one['samples']} x "
        f"{one['length']}: {one['error']}"
        for one in failures[:_MOST_FAILURES]
    ]
    more = len(failures) - len(lines)
    return lines + ([f"and {more} more, in the table cells of study.sqlite"] if more else [])
