"""``calibrant study plan``."""

from calibrant.cli.compress import time_text
from calibrant.cli.console import JsonOption, QuietOption, terminal
from calibrant.cli.study.shared import CacheOption, FolderOption, PlanArgument, WorkersOption
from calibrant.report.tables import size_text
from calibrant.user_cache import STUDIES


def plan(
    file: PlanArgument,
    output: FolderOption = None,
    cache: CacheOption = STUDIES,
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

        found = cb.plan_study(file, output=output, cache=cache, workers=workers, progress=screen.progress)
        screen.result(
            asdict(found),
            f"{found.cells} cells, {found.done} of them done: {found.models} models, {found.recipes} recipes, "
            f"{found.sources} sources, {found.draws} draws",
            f"left: about {time_text(*found.seconds)}, making {found.sets} sets included; "
            f"{size_text(found.memory_bytes)} of memory, {size_text(found.disk_bytes)} of disk",
        )
