"""``calibrant study show``."""

from typing import TYPE_CHECKING, Annotated

import typer

from calibrant.cli.console import JsonOption, QuietOption, terminal
from calibrant.cli.study.shared import PairedOption, StudyArgument

if TYPE_CHECKING:
    from rich.table import Table

    from calibrant import Analysis
    from calibrant.study.findings import BestTwo


def show(
    folder: StudyArgument,
    paired: PairedOption = False,
    difference: Annotated[
        float | None,
        typer.Option("--difference", help="Also say how many draws of two sources would show this difference."),
    ] = None,
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
        found = study.analyse(paired=paired, difference=difference)
        screen.result(found.as_json(), *tables(found, difference))


def tables(found: "Analysis", difference: float | None) -> "list[Table | str]":
    """One table of sources for every model, recipe, size, measure and text, and the finding in a sentence.

    With a ``difference`` also the draws that would show it.
    """
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
        shown += [table, setting.headline]
        if difference is not None and setting.best_two is not None:
            shown.append(_draws_needed(setting.best_two))
        shown.append("")
    return shown


def _draws_needed(two: "BestTwo") -> str:
    if two.draws is None:
        return f"The draws that would show a difference of {two.to_see:.3g} are more than a million, or not known."
    return (
        f"{two.draws:,} draws of each of two sources would show a difference of {two.to_see:.3g} in 80 % of studies, "
        f"at the spread of {two.best} and {two.second} (sd {two.sd:.2g})."
    )
