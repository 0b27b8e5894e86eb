"""A table as the template ``tables.html`` shows it."""

from collections.abc import Mapping
from typing import Any

from calibrant.report.tables import UNDEFINED, Column, Estimate, Table, Undefined, Value, number_text, value_text

# Longer tables are cut on the page.
_MOST_ROWS = 2000


def shown_table(table: Table, colours: Mapping[str, str]) -> dict[str, Any]:
    """What the template shows of a table: what is the same in all rows is said once; ``colours`` are by source."""
    same = {}
    for number, column in enumerate(table.columns):
        values = {value_text(row[number]) for row in table.rows}
        if column.role == "key" and len(values) == 1:
            same[column.name] = values.pop()
    kept = [number for number, column in enumerate(table.columns) if column.name not in same]
    columns = [table.columns[number] for number in kept]
    rows = [
        [_cell(column, row[number], colours) for column, number in zip(columns, kept, strict=True)]
        for row in table.rows[:_MOST_ROWS]
    ]
    said = {name: value for name, value in same.items() if value not in ("", UNDEFINED)}
    return {"table": table, "same": said, "columns": columns, "rows": rows}


def _cell(column: Column, value: Value, colours: Mapping[str, str]) -> dict[str, Any]:
    interval = value.interval if isinstance(value, Estimate) else None
    reason = value.reason if isinstance(value, Undefined | Estimate) and interval is None else ""
    number = value.value if isinstance(value, Estimate) else value
    return {
        "text": value_text(number),
        "interval": f"[{number_text(interval[0])}, {number_text(interval[1])}]" if interval else "",
        "reason": reason,
        "order": "" if isinstance(number, Undefined) else number,
        "kind": column.kind,
        "role": column.role,
        "colour": colours.get(value) if column.role == "source" and isinstance(value, str) else None,
    }
