"""Self-contained HTML page about a study, which opens from disk without a network."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from calibrant.report.page import COLOURS, check_chart_libraries, render
from calibrant.report.shown_table import shown_table
from calibrant.report.tables import Table

# The template contains the same line. A file with this line may be replaced by a newer page.
PAGE_MARK = '<meta name="generator" content="calibrant study report">'


@dataclass(frozen=True)
class Choice:
    """What readers pick for all charts: a field of their rows, its label, and label by value."""

    field: str
    label: str
    options: dict[str, str]


@dataclass(frozen=True)
class Chart:
    """One kind of chart: a panel for each recipe, or a single one.

    Attributes:
        name: names its specification and its place on the page.
        title: heading.
        about: how to read it.
        empty: what is said where there is nothing to draw.
        rows: data; a panel draws those whose fields are as picked.
        notes: fields as in ``rows``, and the finding of a panel as ``note``.
        by_recipe: one panel for each recipe.
        table: name of the table with the same numbers.
        shows_sources: colours are sources that the chart does not name.
    """

    name: str
    title: str
    about: str
    empty: str
    rows: list[dict[str, Any]]
    notes: list[dict[str, Any]]
    by_recipe: bool
    table: str
    shows_sources: bool = True


@dataclass(frozen=True)
class Card:
    """Findings of one model and recipe."""

    title: str
    subtitle: str
    findings: list[str]


@dataclass(frozen=True)
class Failed:
    """A failed cell: which, why, and the whole traceback."""

    cell: str
    error: str
    traceback: str | None


@dataclass(frozen=True)
class StudyPage:
    """All that the page shows.

    Attributes:
        name, description: of the study.
        answer: the finding, in a few sentences.
        warnings: what readers must know first, such as cells that failed.
        facts: numbers of the study, by label.
        cards: findings by model and recipe.
        choices: what charts are picked by.
        measures: by value of the choice ``measure``: its ``kind`` in rows, that kind's ``name``, and the title of an
            ``axis``, which names text or task as well.
        charts: the charts.
        tables: the tables.
        failures: cells that failed.
        sources: names of the sources, in the plan's order, which is that of their colours.
        recipes: names of the recipes.
        plan: the plan as YAML.
        versions: versions of libraries.
    """

    name: str
    description: str
    answer: list[str]
    warnings: list[str]
    facts: dict[str, str]
    cards: list[Card]
    choices: list[Choice]
    measures: dict[str, dict[str, str]]
    charts: list[Chart]
    tables: list[Table]
    failures: list[Failed]
    sources: list[str]
    recipes: list[str]
    plan: str
    versions: dict[str, str]


def study_page(page: StudyPage) -> str:
    """The page as HTML.

    Raises:
        CalibrantError: the extra ``report`` is not installed.
    """
    check_chart_libraries()
    from calibrant.report.study_charts import chart_specs  # needs the extra

    colours = {source: COLOURS[number % len(COLOURS)] for number, source in enumerate(page.sources)}
    data = {
        "specs": chart_specs(colours),
        "measures": page.measures,
        "recipes": page.recipes,
        "charts": {
            one.name: {"rows": _packed(one.rows), "notes": _packed(one.notes), "empty": one.empty}
            for one in page.charts
        },
    }
    return render(
        "study.html",
        page=page,
        colours=colours,
        data=data,
        tables=[shown_table(table, colours) for table in page.tables],
        library=_library(),
    )


def _packed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as columns, of which those that repeat their values are places in a list of words: a tenth of the bytes."""
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [_rounded(row.get(name)) for row in rows]
        words = {word: number for number, word in enumerate(dict.fromkeys(values))}
        is_short = len(words) * 2 < len(values)
        columns[name] = {"words": [*words], "at": [words[one] for one in values]} if is_short else {"values": values}
    return {"length": len(rows), "columns": columns}


def _rounded(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; its making takes seconds."""
    import vl_convert

    return str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # the default is not in its stub
