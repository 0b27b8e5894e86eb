"""What all pages share: the template environment, the libraries that draw charts, and what a page may replace."""

from pathlib import Path
from typing import Any

import jinja2

from calibrant.errors import CalibrantError

# Readable on white and on black, also for most who see fewer colours; sources beyond these begin again.
COLOURS = (
    "#3b82c4",
    "#e07b1a",
    "#2f9e6e",
    "#c9489b",
    "#8a6fd1",
    "#b8860b",
    "#d1495b",
    "#17a2b8",
    "#7a8b99",
    "#6b8e23",
    "#1f5f99",
    "#f5b041",
    "#76c7a3",
    "#e39ac8",
    "#5b3fa8",
    "#8c6d5a",
    "#f08a8a",
    "#0e7c86",
    "#a9b4bf",
    "#a3c644",
)
# The mark of a page is within this many bytes from its start.
_HEAD_BYTES = 500


def render(template: str, **values: Any) -> str:
    """The page as HTML; everything in ``values`` is escaped, and numbers for scripts must be finite."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("calibrant.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.get_template(template).render(**values)


def check_chart_libraries() -> None:
    """Check that the libraries that draw charts are installed.

    Raises:
        CalibrantError: the extra ``report`` is not installed.
    """
    try:
        import altair  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise CalibrantError("a page with charts needs the extra: pip install 'calibrant[report]'") from error


def is_replaceable(path: Path, mark: str) -> bool:
    """Whether a page may be written to ``path``: nothing is there, or a page with the same ``mark``."""
    return not path.exists() or (path.is_file() and mark.encode() in path.read_bytes()[:_HEAD_BYTES])
