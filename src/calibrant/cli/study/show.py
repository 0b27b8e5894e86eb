"""``calibrant study show``."""

from typing import TYPE_CHECKING

from calibrant.cli.console import JsonOption, QuietOption, terminal
from calibrant.cli.study.shared import PairedOption, StudyArgument

if TYPE_CHECKING:
    from rich.table import Table

    from calibrant import Analysis


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
