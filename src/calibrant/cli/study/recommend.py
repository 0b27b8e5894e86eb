"""``calibrant study recommend``."""

from typing import Annotated

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
    cache: CacheOption = STUDIES,
    executor: ExecutorOption = "local",
    workers: WorkersOption = 1,
    processors: ProcessorsOption = 1,
    devices: DevicesOption = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the best source with few cells: sources that are clearly worse get no more draws.

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
        if found.failed:
            raise typer.Exit(1)
