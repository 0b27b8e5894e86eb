"""What all pages share: the template environment, the libraries that draw charts, and what a page may replace."""

from pathlib import Path
from typing import Any

import jinja2

from calibrant.errors import CalibrantError

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
