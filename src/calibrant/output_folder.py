"""Output folders and files that appear complete or not at all."""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from calibrant.errors import CalibrantError
from calibrant.owned_folder import KEPT, owned_folder, remove_abandoned

# Every finished output contains one of these files: a compressed model the first, a calibration set the second. Other
# programs write files of these names too, without these keys.
_OUTPUT_MARKERS = {"calibrant.json": b'"calibrant_version"', "manifest.json": b'"tokenizer_sha256"'}
_SET_FILES = {"manifest.json", "tokens.safetensors"}
# Files of an output that its record does not list: of the end of the run, and of later commands.
_LATER_FILES = {"report.json", "report.html", "evaluation.json", "model.gguf"}
# The folder of a training's curves, whose files a record cannot name.
_CURVES = "training"
_NAMED_STRANGERS = 5
# Names in an output folder that are no part of an output: our unfinished work, and what a new ext4 volume contains.
_OURS, _VOLUME = ".calibrant.", "lost+found"
_MOUNTS = Path("/proc/self/mountinfo")


def check_output(target: str | Path, overwrite: bool, inputs: Sequence[str | Path] = ()) -> Path:
    """Return ``target`` as a path if an output may be written there.

    ``inputs`` are the paths that the run reads; the output must not replace them.

    Raises:
        CalibrantError: the target exists and must not be replaced, contains an input, or cannot be created.
    """
    path = Path(target)
    try:
        _check_place(path, inputs)
        _check_replaceable(path, overwrite)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


def _check_place(path: Path, inputs: Sequence[str | Path]) -> None:
    place = _resolved(path)
    for one in inputs:
        read = _resolved(Path(one))
        if read.exists() and (read == place or place in read.parents):
            raise CalibrantError(f"{path}: holds the input {one}; choose another output")
    if _exists(place) and not place.is_dir():
        raise CalibrantError(f"{path}: exists and is not a folder; choose another output")
    existing = place if _stays(place) else next(p for p in place.parents if p.exists())
    if not existing.is_dir():
        raise CalibrantError(f"{existing}: is not a folder, so {path} cannot be made in it")
    if not os.access(existing, os.W_OK | os.X_OK):
        inside = f", so {path} cannot be made in it" if path != existing else ""
        raise CalibrantError(f"{existing}: cannot be written{inside}; choose another output")


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises RuntimeError for links in a circle


def _exists(place: Path) -> bool:
    """Whether ``place`` exists; unlike ``Path.exists``, raises OSError for names that cannot be."""
    try:
        place.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _check_replaceable(path: Path, overwrite: bool) -> None:
    if not path.is_dir() or not _content(path):
        return
    if not overwrite:
        raise CalibrantError(f"{path}: exists and is not empty; choose another output, or `overwrite=True` replaces it")
    markers = ((path / name, key) for name, key in _OUTPUT_MARKERS.items())
    if not any(marker.is_file() and key in marker.read_bytes() for marker, key in markers):
        raise CalibrantError(f"{path}: is no earlier output of Calibrant, so it is not replaced; choose another output")
    strangers = _strangers(path)
    if strangers:
        more = f" and {len(strangers) - _NAMED_STRANGERS} more" if len(strangers) > _NAMED_STRANGERS else ""
        raise CalibrantError(
            f"{path}: holds files that Calibrant did not write ({', '.join(strangers[:_NAMED_STRANGERS])}{more}); "
            "`overwrite=True` would remove them, so move them or delete the folder"
        )


def _strangers(folder: Path) -> list[str]:
    """Files in an earlier output that are not its own, hidden ones aside; none of models that do not list theirs."""
    known = _SET_FILES
    if (folder / "calibrant.json").is_file():
        try:
            listed = json.loads((folder / "calibrant.json").read_bytes()).get("files")
        except (ValueError, AttributeError, RecursionError):  # damaged: the output is replaced as a whole
            listed = None
        if not isinstance(listed, list):
            return []
        known = _LATER_FILES | set(map(str, listed))
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    shown = [one for one in files if not any(part.startswith(".") for part in one.parts)]
    named = (one.as_posix() for one in shown if one.parts[0] not in (_VOLUME, _CURVES))
    return sorted(name for name in named if name not in known)


def _content(folder: Path) -> list[Path]:
    """What is in an output folder; filled in this order, it looks complete only when it is."""
    found = [path for path in folder.iterdir() if not path.name.startswith(_OURS) and path.name != _VOLUME]
    return sorted(found, key=lambda path: (path.name in _OUTPUT_MARKERS, path.name))


def companion(output: Path, ending: str) -> Path:
    """Path, on the file system of ``output``, of what outlives a run that fails: beside it, or in a folder that stays.

    Raises:
        CalibrantError: no file can have that name.
    """
    place = _resolved(output)
    path = place / f"{_OURS}{ending}" if _stays(place) else place.with_name(f"{place.name}.{ending}")
    try:
        _exists(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


@contextmanager
def staged(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder next to ``target``; rename it to ``target`` at the end, remove it on any failure.

    A folder that exists at ``target`` by then is replaced only with ``overwrite`` and only if it is an earlier output.
    It is moved aside first, so that a complete folder exists at every moment. Into a folder that cannot be replaced,
    such as a mount point, the files are moved one by one, and the one that marks a complete output last. What killed
    runs left there is removed first.

    Raises:
        CalibrantError: the disk is full, or the target cannot be written or must not be replaced.
    """
    try:
        place = _resolved(target)
        stays = _stays(place)
        parent = place if stays else place.parent
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent)
        with owned_folder(parent, _OURS.strip(".") if stays else place.name) as own:
            new = own / "new"
            new.mkdir()
            yield new
            for folder, _, files in os.walk(new):
                for name in files:
                    sync(Path(folder, name))
                sync(Path(folder))
            try:
                _check_replaceable(target, overwrite)
            except CalibrantError as error:  # it was not there when the run began
                raise CalibrantError(f"{error}. It appeared during the run: move it, and run again") from error
            old = own / KEPT
            if stays or not _replaced(new, place, old):
                _replace_content(new, place, old)
            sync(parent)
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(target, error) from error


def _stays(folder: Path) -> bool:
    """Whether the resolved ``folder`` exists and cannot, or should not, be replaced by renaming another to it."""
    if not folder.is_dir():
        return False
    if folder.samefile(Path.cwd()) or _is_mount_point(folder) or any(folder.glob(f"{_OURS}*")):
        return True
    parent = folder.parent.stat()
    owners = {0, folder.stat().st_uid, parent.st_uid}
    foreign = bool(parent.st_mode & stat.S_ISVTX) and os.geteuid() not in owners
    return foreign or not os.access(folder.parent, os.W_OK | os.X_OK)


def _is_mount_point(folder: Path) -> bool:
    if os.path.ismount(folder):
        return True
    # ``ismount`` does not see a folder mounted from the same file system, which Linux lists.
    lines = _MOUNTS.read_bytes().splitlines() if _MOUNTS.is_file() else []
    points = (re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), line.split()[4]) for line in lines)
    return os.fsencode(folder) in points


def _replaced(new: Path, place: Path, old: Path) -> bool:
    """Rename ``new`` to ``place``, and what is there to ``old``; False, with nothing changed, if that cannot be."""
    try:
        if place.is_dir() and any(place.iterdir()):
            place.rename(old)
        new.rename(place)
    except BaseException as error:
        if old.exists():
            old.rename(place)
        # Some file systems of containers cannot rename folders that come from their image.
        if isinstance(error, OSError) and place.is_dir():
            return False
        raise
    return True


def _replace_content(new: Path, place: Path, old: Path) -> None:
    """Move the content of ``place`` to ``old``, and that of ``new`` to ``place``."""
    moved: list[tuple[Path, Path]] = []
    old.mkdir()
    try:
        for path in [*reversed(_content(place)), *_content(new)]:
            there = (old if path.parent == place else place) / path.name
            shutil.move(path, there)
            moved.append((path, there))
    except BaseException:
        for path, there in reversed(moved):
            shutil.move(there, path)
        old.rmdir()
        raise


def check_disk(target: Path, needed: int) -> None:
    """Check that ``needed`` bytes are free where ``target`` will be, less what an interrupted run has written there.

    Raises:
        CalibrantError: there are not.
    """
    place = _resolved(target)
    existing = next(path for path in (place, *place.parents) if path.exists())
    journal = companion(target, "journal")
    written = sum(path.stat().st_size for path in journal.rglob("*") if path.is_file()) if journal.is_dir() else 0
    free = shutil.disk_usage(existing).free + written
    if free < needed:
        raise CalibrantError(
            f"{target}: the run needs about {needed / 1e6:,.1f} MB of disk, {free / 1e6:,.1f} MB are free; free some, "
            "or choose another output"
        )


def check_file(target: str | Path, overwrite: bool, magic: bytes) -> Path:
    """Return ``target`` as a path if an output file that begins with ``magic`` may be written there.

    Raises:
        CalibrantError: the target exists and must not be replaced, or cannot be created.
    """
    path = Path(target)
    try:
        _check_place(path.parent, ())
        if path.exists():
            if not overwrite or path.is_dir():
                raise CalibrantError(f"{path}: exists; choose another file, or `overwrite=True` replaces it")
            with path.open("rb") as file:
                if file.read(len(magic)) != magic:
                    raise CalibrantError(
                        f"{path}: is no earlier {magic.decode()} file, so it is not replaced; choose another file"
                    )
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise CalibrantError(f"{path.parent}: cannot be written; choose another output")
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``target``; rename it to ``target`` at the end, remove it on any failure.

    Raises:
        CalibrantError: the disk is full or the target cannot be written.
    """
    try:
        parent = target.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent)
        with owned_folder(parent, target.name) as own:
            staging = own / target.name
            yield staging
            sync(staging)
            staging.replace(target)
            sync(parent)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(target, error) from error


def sync(place: Path) -> None:
    """Wait until the file, or the names in the folder, ``place`` are on the disk.

    Raises:
        OSError: the disk fails or is full.
    """
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems know no such thing for folders
            raise
    finally:
        os.close(descriptor)


def _cannot_write(target: Path, error: Exception) -> CalibrantError:
    full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error)
    reason = "no space left on the disk, free some or choose another output" if full else str(error)
    return CalibrantError(f"{target}: cannot be written ({reason})")
