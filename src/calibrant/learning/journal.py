"""An unfinished training beside its output: where it was, so that a killed one can go on, and its curves."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path
from typing import Any

import torch

from calibrant.errors import CalibrantError, first_line
from calibrant.hashing import canonical_json
from calibrant.output_folder import whole_file

_IDENTITY = "training.json"
CURVES = "curves"


class Journal:
    """The folder ``OUTPUT.training``, made when something is written; ``CURVES`` in it is for TensorBoard's files.

    Args:
        output: the run's output folder, which need not exist yet.
        identity: everything that the training depends on.
        overwrite: begin anew where the journal is of another training.

    Raises:
        CalibrantError: a journal of another training lies there, or something that is none.
    """

    def __init__(self, output: Path, identity: dict[str, Any], overwrite: bool) -> None:
        self.folder = output.absolute().parent / f"{output.name}.training"
        self._identity = canonical_json(identity)
        mark = self.folder / _IDENTITY
        if not mark.is_file():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise CalibrantError(f"{self.folder}: is in the way of the training's journal; move it")
        elif mark.read_text(encoding="utf-8") != self._identity:
            if not overwrite and self._saved():
                raise CalibrantError(
                    f"{self.folder}: holds an unfinished training with other settings, model or data; run that again, "
                    "delete the folder, or pass --overwrite"
                )
            shutil.rmtree(self.folder)

    def opened(self) -> Path:
        """The folder, which exists now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / _IDENTITY).is_file():
            with whole_file(self.folder / _IDENTITY) as beside:
                beside.write_text(self._identity, encoding="utf-8")
        return self.folder

    def _saved(self) -> bool:
        return any(self.folder.glob("*.pt"))

    def read(self, name: str) -> dict[str, Any] | None:
        """The state that was written last under ``name``, or None.

        Raises:
            CalibrantError: it is damaged.
        """
        file = self.folder / f"{name}.pt"
        if not file.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file fails in pickle, zip or tensor code
            raise CalibrantError(
                f"{file}: damaged ({first_line(error)}); delete {self.folder} to begin the training anew"
            ) from error
        return state

    def write(self, name: str, state: dict[str, Any]) -> None:
        """Replace the state of ``name`` (tensors, numbers, texts in dicts and lists), whole or not at all.

        Raises:
            CalibrantError: it cannot be written.
        """
        with whole_file(self.opened() / f"{name}.pt") as beside:
            try:
                torch.save(state, beside)
            except RuntimeError as error:  # what its writer makes of a full disk
                raise OSError(ENOSPC, str(error)) from error

    def keep_curves(self, target: Path) -> None:
        """Copy the curves, if there are any, to ``target``."""
        if (self.folder / CURVES).is_dir():
            shutil.copytree(self.folder / CURVES, target)

    @contextmanager
    def left_if_worth_it(self) -> Iterator[None]:
        """Where learning is broken off before there is a state to go on from, nothing is left behind."""
        try:
            yield
        except BaseException:
            if not self._saved():
                self.remove()
            raise

    def remove(self) -> None:
        """The training is over."""
        shutil.rmtree(self.folder, ignore_errors=True)
