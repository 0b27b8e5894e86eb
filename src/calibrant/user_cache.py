"""The folder in which everything that can be made again is kept for this user."""

from pathlib import Path

USER_CACHE = Path.home() / ".cache" / "calibrant"
STUDIES = USER_CACHE / "studies"
