"""Self-contained HTML page that compares compressed models, which opens from disk without a network."""

from collections.abc import Sequence

from calibrant.report.page import render
from calibrant.report.shown_table import shown_table
from calibrant.report.tables import Table

# The template contains the same line. A file with this line may be replaced by a newer page.
PAGE_MARK = '<meta name="generator" content="calibrant compare">'


def comparison_page(names: Sequence[str], findings: Sequence[str], tables: Sequence[Table]) -> str:
    """The page as HTML: ``findings`` are sentences above the ``tables``."""
    return render(
        "comparison.html", names=names, findings=findings, tables=[shown_table(table, {}) for table in tables]
    )
