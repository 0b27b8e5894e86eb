"""Tables of a page, which are also written as CSV, Markdown and LaTeX."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

UNDEFINED = "\N{EN DASH}"
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    UNDEFINED: "--",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
_MARKDOWN = {character: f"\\{character}" for character in "\\|*_`[]<>"}


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; ``reason`` says why there is no interval."""

    value: float
    interval: tuple[float, float] | None
    reason: str = ""


@dataclass(frozen=True)
class Undefined:
    """A number that is not defined, and why."""

    reason: str


Value = str | int | float | Estimate | Undefined


@dataclass(frozen=True)
class Column:
    """A column: its values are texts, numbers, or estimates, which take three columns of a CSV file.

    A page says a ``key`` once if it is the same in all rows, marks a ``source`` with its colour, and wraps ``long``
    text.
    """

    name: str
    kind: Literal["text", "number", "estimate"] = "text"
    role: Literal["", "key", "source", "long"] = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: names the table's files and its place on the page.
        title: heading and caption.
        about: what it shows, in a sentence or two.
        empty: what is said if it has no rows.
        columns: the columns.
        rows: one value for each column.
    """

    name: str
    title: str
    about: str
    empty: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]


def number_text(value: float) -> str:
    """A number with four digits, and whole numbers and large ones with all digits before the point."""
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:.4g}"


def size_text(count: float) -> str:
    """``count`` bytes in a decimal unit with one digit after the point."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def value_text(value: Value) -> str:
    """A value as readers see it; what is undefined is a dash."""
    match value:
        case str():
            return value
        case Undefined():
            return UNDEFINED
        case Estimate():
            ends = "" if value.interval is None else f" [{', '.join(map(number_text, value.interval))}]"
            return f"{number_text(value.value)}{ends}"
        case _:
            return number_text(value)


def as_csv(table: Table) -> str:
    """The table with all digits; an estimate takes columns for its value and both ends; what is undefined is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names: list[str] = []
    for column in table.columns:
        ends = [f"{column.name} {end}" for end in ("low", "high")] if column.kind == "estimate" else []
        names += [column.name, *ends]
    writer.writerow(names)
    for row in table.rows:
        cells: list[str | float] = []
        for column, value in zip(table.columns, row, strict=True):
            cells += _csv_cells(value, 3 if column.kind == "estimate" else 1)
        writer.writerow(cells)
    return text.getvalue()


def as_markdown(table: Table) -> str:
    """The table as Markdown."""
    lines = [_row(column.name for column in table.columns)]
    lines.append(_row("---" if column.kind == "text" else "---:" for column in table.columns))
    lines += [_row(_replaced(value_text(value), _MARKDOWN) for value in row) for row in table.rows]
    return "\n".join(lines) + "\n"


def as_latex(table: Table) -> str:
    """The table as a ``longtable`` of the packages longtable and booktabs."""
    header = " & ".join(_replaced(column.name, _LATEX) for column in table.columns) + r" \\"
    layout = "".join("l" if column.kind == "text" else "r" for column in table.columns)
    lines = [rf"\begin{{longtable}}{{{layout}}}", rf"\caption{{{_replaced(table.title, _LATEX)}}}"]
    lines += [rf"\label{{tab:{table.name}}} \\", r"\toprule", header, r"\midrule", r"\endhead", r"\bottomrule"]
    lines.append(r"\endlastfoot")
    lines += [" & ".join(_replaced(value_text(value), _LATEX) for value in row) + r" \\" for row in table.rows]
    return "\n".join([*lines, r"\end{longtable}", ""])


def _csv_cells(value: Value, width: int) -> list[str | float]:
    match value:
        case Undefined():
            return [""] * width
        case Estimate(number, interval):
            return [number, *(interval or ("", ""))]
        case _:
            return [value]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _replaced(text: str, characters: dict[str, str]) -> str:
    return "".join(characters.get(character, character) for character in " ".join(text.split()))
