"""What studies compute, by the hash of everything that decides it: shared by all studies that use one folder."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calibrant.hashing import canonical_json
from calibrant.output_folder import whole_file
from calibrant.owned_folder import owned_folder, remove_abandoned


class Cache:
    """Folders and results that appear complete or not at all; processes may share them.

    Two processes that compute the same at the same time write the same, and the second changes nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, kind: str, key: str) -> Path:
        """Where the folder of ``kind`` ("sets", "originals", "outputs") with ``key`` is or will be."""
        return self.folder / kind / key

    def clean(self) -> None:
        """Remove what killed processes left."""
        for folder in self.folder.glob("*"):
            remove_abandoned(folder)

    def make(self, kind: str, key: str, fill: Callable[[Path], None]) -> Path:
        """The folder; ``fill`` fills an empty one if it does not exist."""
        place = self.place(kind, key)
        if not place.is_dir():
            with self.scratch(kind, key) as own:
                (own / "new").mkdir()
                fill(own / "new")
                self.publish(own / "new", kind, key)
        return place

    @contextmanager
    def scratch(self, kind: str, key: str) -> Iterator[Path]:
        """A temporary folder beside the one of ``kind`` with ``key``."""
        parent = self.place(kind, key).parent
        parent.mkdir(parents=True, exist_ok=True)
        with owned_folder(parent, key) as own:
            yield own

    def publish(self, made: Path, kind: str, key: str) -> None:
        """Rename ``made`` to its place, unless another process was first."""
        place = self.place(kind, key)
        try:
            made.rename(place)
        except OSError:
            if not place.is_dir():
                raise

    def result(self, key: str) -> dict[str, Any] | None:
        """The result with ``key``; None if there is none, or if its file is damaged: the file then goes."""
        file = self._file(key)
        if not file.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(file.read_bytes())
            if not {"measures", "items"} <= found.keys() and "seconds" not in found:
                raise ValueError("it has no results")
        except (ValueError, AttributeError):
            file.unlink(missing_ok=True)
            return None
        return found

    def keep(self, key: str, result: dict[str, Any]) -> None:
        """Store a result."""
        file = self._file(key)
        with whole_file(file) as beside:
            beside.write_text(canonical_json(result), encoding="utf-8")

    def _file(self, key: str) -> Path:
        return self.folder / "results" / f"{key}.json"
