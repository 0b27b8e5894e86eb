"""JSON files of a stranger's model folder."""

import json
from pathlib import Path
from typing import Any

from calibrant.errors import CalibrantError, first_line


def read_json(path: Path, largest_bytes: int) -> dict[str, Any]:
    """The JSON object in ``path``; Infinity and NaN are numbers, as for Python and transformers.

    Raises:
        CalibrantError: the file is not a JSON object, or has more than ``largest_bytes``.
    """
    try:
        if path.stat().st_size > largest_bytes:
            raise CalibrantError(f"{path}: larger than {largest_bytes >> 20} MiB, which no such file needs")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrantError(f"{path}: not readable JSON ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise CalibrantError(f"{path}: expected a JSON object")
    return value
