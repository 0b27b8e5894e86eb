"""The journal of a run: saved state beside the output, from which the same run continues after it was interrupted.

A run holds the journal's lock, so that no two runs write to one output. States are replaced as whole files, and are on
the disk before anything counts on them. The journal is removed when the output is there.
"""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from calibrant.errors import CalibrantError, first_line
from calibrant.hashing import canonical_json, sha256_bytes
from calibrant.output_folder import companion, whole_file
from calibrant.owned_folder import is_owned

_IDENTITY = "run.json"
_LOCK = "lock"
_SUFFIX = ".safetensors"
SET = "set"
"""Subfolder for a calibration set that the run made; it outlives a run without a state."""

# What else a run keeps in its journal: written parts, hidden states by rank, counted tokens, curves.
_FOLDERS = re.compile(r"parts|states-\d+|counted|curves")
_KEY, _HASH = "calibrant.state", "calibrant.sha256"


def journal_folder(output: Path) -> Path:
    """Path of the journal of a run that writes to ``output``: beside it, or within a mount point.

    Raises:
        CalibrantError: the path is taken by something other than a journal.
    """
    folder = companion(output, "journal")
    if folder.is_symlink() or folder.is_file():
        raise CalibrantError(f"{folder}: is in the way of the run's journal; move it")
    foreign = [path.name for path in folder.iterdir() if not _is_ours(path)] if folder.is_dir() else []
    if foreign:
        raise CalibrantError(
            f"{folder}: is in the way of the run's journal, and holds {foreign[0]}, which no journal has; move it"
        )
    return folder


def is_unfinished(output: Path) -> bool:
    """Whether an interrupted run that writes to ``output`` can be resumed.

    Raises:
        CalibrantError: the journal's path is taken by something other than a journal.
    """
    return _has_state(journal_folder(output))


def check_same_run(output: Path, identity: dict[str, Any]) -> None:
    """Check that the journal of ``output`` is of the run with ``identity``.

    Raises:
        CalibrantError: the journal belongs to another run, or is damaged.
    """
    folder = journal_folder(output)
    found, wanted = read_identity(folder), json.loads(canonical_json(identity))
    if found != wanted:
        kinds = ["a calibration set" if "set" in one else "a compression" for one in (found, wanted)]
        differs = _first_difference(found, wanted)
        if kinds[0] != kinds[1]:
            differs = f"it makes {kinds[0]}, not {kinds[1]}"
        raise CalibrantError(
            f"{folder}: holds an unfinished run with other settings, model or data: {differs}; "
            "run that again, delete the folder, or pass `overwrite=True`"
        )


def read_identity(folder: Path) -> dict[str, Any]:
    """What the run of the journal in ``folder`` depends on.

    Raises:
        CalibrantError: the journal is damaged.
    """
    file = folder / _IDENTITY
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (ValueError, OSError, RecursionError) as error:
        raise CalibrantError(f"{file}: damaged; delete {folder} to begin the run anew") from error
    return found


def is_running(folder: Path) -> bool:
    """Whether a living run holds the journal in ``folder``."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return not _locked(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """The journal of a run that writes to ``output``; its folder exists while the run holds it.

    Args:
        output: the run's output folder, which need not exist yet.
        identity: everything that the result depends on.
        overwrite: start again if the journal belongs to another run.

    Raises:
        CalibrantError: the journal's path is taken by something else.
    """

    def __init__(self, output: Path, identity: dict[str, Any], overwrite: bool) -> None:
        self.folder = journal_folder(output)
        self._output, self._identity, self._overwrite = output, identity, overwrite

    @contextmanager
    def held(self) -> Iterator["Journal"]:
        """Hold the journal's lock. A journal with neither a state nor a set at the end is removed, and so is
        that of a run that is refused by what it computed.

        Raises:
            CalibrantError: another run holds it, or it belongs to another unfinished run.
        """
        with self._locked():
            self._clean()
            if not (self.folder / _IDENTITY).is_file():
                with whole_file(self.folder / _IDENTITY) as beside:
                    beside.write_text(canonical_json(self._identity), encoding="utf-8")
            try:
                yield self
            except CalibrantError as error:
                if error.__cause__ is None:  # neither the disk nor the journal: the same run fails again
                    self.remove()
                raise
            finally:
                if not _has_state(self.folder) and not (self.folder / SET).is_dir():
                    self.remove()

    def _clean(self) -> None:
        """Remove what this run cannot go on from: everything of another run, and without a state all but the set.

        Raises:
            CalibrantError: another run can go on from it, and is not to be overwritten.
        """
        kept = {_LOCK}
        for path in self.folder.iterdir():
            if path.is_symlink():
                raise CalibrantError(f"{path}: is a link, which no journal has; delete {self.folder}")
        if (self.folder / _IDENTITY).is_file():
            try:
                check_same_run(self._output, self._identity)
                if _has_state(self.folder):
                    return
                kept |= {_IDENTITY, SET}
            except CalibrantError:
                if _has_state(self.folder) and not self._overwrite:
                    raise
        for path in self.folder.iterdir():
            if path.name in kept:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:  # another run has just removed the folder
                continue
            except OSError as error:
                raise CalibrantError(f"{self.folder}: cannot be written ({first_line(error)})") from error
            if not _locked(descriptor):
                os.close(descriptor)
                raise CalibrantError(
                    f"{self._output}: another run writes there now; wait until it ends, or choose another output"
                )
            # The folder may have been removed, and made again by another run, before this one had the lock.
            if _is_same(descriptor, self.folder / _LOCK):
                break
            os.close(descriptor)
        try:
            yield
        finally:
            os.close(descriptor)

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
                said = opened.metadata()
                if said[_HASH] != _state_hash(said[_KEY], tensors):
                    raise ValueError("does not have its hash")
                state: dict[str, Any] = _from_json(json.loads(said[_KEY]), tensors)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise self.damaged(file, first_line(error)) from error
        return state

    def damaged(self, file: Path, why: str) -> CalibrantError:
        """The error for a damaged ``file`` of the journal."""
        return CalibrantError(f"{file}: damaged ({why}); delete {self.folder} to begin the run anew")

    def write(self, name: str, state: dict[str, Any]) -> None:
        """Atomically replace the state of ``name``: tensors, numbers and strings in dicts and lists.

        Raises:
            CalibrantError: the state cannot be written.
        """
        tensors: dict[str, torch.Tensor] = {}
        rest = json.dumps(_to_json(state, tensors))
        with whole_file(self.folder / f"{name}{_SUFFIX}") as beside:
            save_file(tensors, beside, {_KEY: rest, _HASH: _state_hash(rest, tensors)})

    def drop(self, pattern: str, but: str | None = None) -> None:
        """Delete the states whose names match ``pattern``, except ``but``."""
        for file in self.folder.glob(f"{pattern}{_SUFFIX}"):
            if file.stem != but:
                file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the journal."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class SavedState:
    """A state of a journal and when it was written, in seconds since 1970."""

    name: str
    written: float


def saved_states(folder: Path) -> list[SavedState]:
    """The states in the journal ``folder``, the latest last."""
    found = [SavedState(path.stem, path.stat().st_mtime) for path in folder.glob(f"*{_SUFFIX}")]
    return sorted(found, key=lambda one: one.written)


def saved_numbers(folder: Path, name: str) -> dict[str, int | float | str]:
    """The numbers and strings at the top of the state ``name`` in the journal ``folder``; none if there is no state.

    Raises:
        CalibrantError: the file is damaged.
    """
    file = folder / f"{name}{_SUFFIX}"
    if not file.is_file():
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            pairs = json.loads(opened.metadata()[_KEY])["dict"]
        return {key: value for key, value in pairs if isinstance(value, int | float | str)}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CalibrantError(f"{file}: damaged ({first_line(error)}); delete {folder} to begin the run anew") from error


def _state_hash(rest: str, tensors: dict[str, torch.Tensor]) -> str:
    numbers = (tensors[name].cpu().flatten().view(torch.uint8).numpy().data for name in sorted(tensors))
    return sha256_bytes(rest.encode(), *numbers)


def _has_state(folder: Path) -> bool:
    return any(folder.glob(f"*{_SUFFIX}"))


def _is_ours(path: Path) -> bool:
    name = path.name
    if is_owned(name) or name in (_LOCK, _IDENTITY, SET):
        return True
    return path.suffix == _SUFFIX or _FOLDERS.fullmatch(name) is not None


def _locked(descriptor: int) -> bool:
    """Lock the file; False if another process holds the lock. True where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
    return True


def _is_same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _first_difference(found: Any, wanted: Any, place: str = "") -> str:
    """Where two JSON values differ first, and how."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            one, other = found.get(key), wanted.get(key)
            if one != other:
                return _first_difference(one, other, f"{place}.{key}" if place else key)
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            if one != other:
                return _first_difference(one, other, f"{place}[{number}]")
    return f"{place} is {_short(found)} there and {_short(wanted)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


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
