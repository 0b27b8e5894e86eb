"""The journal of a training: saved state from which an interrupted training resumes, and the training curves."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from calibrant.errors import CalibrantError, first_line
from calibrant.hashing import canonical_json
from calibrant.output_folder import companion, whole_file
from calibrant.owned_folder import is_owned

_IDENTITY = "training.json"
_SUFFIX = ".safetensors"
_KEY = "calibrant.state"
CURVES = "curves"


def journal_folder(output: Path) -> Path:
    """Path of the journal of a training that writes to ``output``: beside it, or within a mount point.

    Raises:
        CalibrantError: the path is taken by something other than a journal.
    """
    folder = companion(output, "training")
    kept = [path for path in folder.iterdir() if not is_owned(path.name)] if folder.is_dir() else []
    if folder.is_file() or (kept and not (folder / _IDENTITY).is_file()):
        raise CalibrantError(f"{folder}: is in the way of the training's journal; move it")
    return folder


def is_unfinished(output: Path) -> bool:
    """Whether an interrupted training that writes to ``output`` can be resumed.

    Raises:
        CalibrantError: the journal's path is taken by something other than a journal.
    """
    return _has_state(journal_folder(output))


def check_same_training(output: Path, identity: dict[str, Any]) -> None:
    """Check that the journal of ``output`` matches ``identity``, which may lack keys that are not known yet.

    Raises:
        CalibrantError: the journal belongs to another training, or is damaged.
    """
    folder = journal_folder(output)
    file = folder / _IDENTITY
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CalibrantError(f"{file}: damaged; delete {folder} to begin the training anew") from error
    wanted = json.loads(canonical_json(identity))
    if {key: found.get(key) for key in wanted} != wanted:
        raise CalibrantError(
            f"{folder}: holds an unfinished training with other settings, model or data; run that again, "
            "delete the folder, or pass `overwrite=True`"
        )


class Journal:
    """The journal's folder, created by the first write; its subfolder ``CURVES`` is for TensorBoard's files.

    Args:
        output: the run's output folder, which need not exist yet.
        identity: everything that the training depends on.
        overwrite: start again if the journal belongs to another training.

    Raises:
        CalibrantError: the journal belongs to another training, or its path is taken by something else.
    """

    def __init__(self, output: Path, identity: dict[str, Any], overwrite: bool) -> None:
        self.folder = journal_folder(output)
        self._identity = canonical_json(identity)
        mark = self.folder / _IDENTITY
        if mark.is_file() and mark.read_text(encoding="utf-8") != self._identity:
            if not overwrite and is_unfinished(output):
                check_same_training(output, identity)
            shutil.rmtree(self.folder)

    def opened(self) -> Path:
        """Create the folder if needed, with the training's identity in it, and return it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / _IDENTITY).is_file():
            with whole_file(self.folder / _IDENTITY) as beside:
                beside.write_text(self._identity, encoding="utf-8")
        return self.folder

    def read(self, name: str) -> dict[str, Any] | None:
        """The last state written under ``name``, or None.

        Raises:
            CalibrantError: the file is damaged.
        """
        file = self.folder / f"{name}{_SUFFIX}"
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # not a dict
                state: dict[str, Any] = _from_json(json.loads(opened.metadata()[_KEY]), tensors)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CalibrantError(
                f"{file}: damaged ({first_line(error)}); delete {self.folder} to begin the training anew"
            ) from error
        return state

    def write(self, name: str, state: dict[str, Any]) -> None:
        """Atomically replace the state of ``name``: tensors, numbers and strings in dicts and lists.

        Raises:
            CalibrantError: the state cannot be written.
        """
        tensors: dict[str, torch.Tensor] = {}
        rest = json.dumps(_to_json(state, tensors))
        with whole_file(self.opened() / f"{name}{_SUFFIX}") as beside:
            save_file(tensors, beside, {_KEY: rest})

    def keep_curves(self, target: Path) -> None:
        """Copy the training curves, if any, to ``target``."""
        if (self.folder / CURVES).is_dir():
            shutil.copytree(self.folder / CURVES, target)

    @contextmanager
    def removed_without_state(self) -> Iterator[None]:
        """Remove the journal if the context fails before a state was saved."""
        try:
            yield
        except BaseException:
            if not _has_state(self.folder):
                self.remove()
            raise

    def remove(self) -> None:
        """Delete the journal."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _has_state(folder: Path) -> bool:
    return any(folder.glob(f"*{_SUFFIX}"))


def _to_json(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Convert ``value`` for JSON and move its tensors to ``tensors``, numbered. Dict keys may be of any JSON type."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _to_json(one, tensors)] for key, one in value.items()]}
    return {"list": [_to_json(one, tensors) for one in value]} if isinstance(value, list | tuple) else value


def _from_json(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Inverse of ``_to_json``."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "dict" in value:
        return {key: _from_json(one, tensors) for key, one in value["dict"]}
    return [_from_json(one, tensors) for one in value["list"]]
