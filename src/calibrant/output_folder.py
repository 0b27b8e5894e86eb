"""Output folders and files that appear complete or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from calibrant.errors import CalibrantError

# Every finished output contains one of these: a compressed model the first, a calibration set the second.
_OUTPUT_MARKERS = ("calibrant.json", "manifest.json")


def check_output(target: str | Path, overwrite: bool, inputs: Sequence[str | Path] = ()) -> Path:
    """Return ``target`` as a path if an output may be written there.

    ``inputs`` are the paths that the run reads; the output must not replace them.

    Raises:
        CalibrantError: the target exists and must not be replaced, contains an input, or cannot be created.
    """
    path = Path(target)
    for place in inputs:
        read = Path(place).resolve()
        if read.exists() and (read == path.resolve() or path.resolve() in read.parents):
            raise CalibrantError(f"{path}: holds the input {place}; choose another output")
    if path.is_symlink():
        raise CalibrantError(f"{path}: is a link; name the folder itself")
    if path.exists() and not path.is_dir():
        raise CalibrantError(f"{path}: exists and is not a folder; choose another output")
    _check_replaceable(path, overwrite)
    parent = path.absolute().parent
    existing = next(p for p in (parent, *parent.parents) if p.exists())
    if not existing.is_dir():
        raise CalibrantError(f"{existing}: is not a folder, so {path} cannot be made in it")
    return path


def _check_replaceable(path: Path, overwrite: bool) -> None:
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise CalibrantError(f"{path}: exists and is not empty; choose another output, or `overwrite=True` replaces it")
    if not any((path / marker).is_file() for marker in _OUTPUT_MARKERS):
        raise CalibrantError(f"{path}: is no earlier output of Calibrant, so it is not replaced; choose another output")


@contextmanager
def staged(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder next to ``target``; rename it to ``target`` at the end, remove it on any failure.

    A folder that exists at ``target`` by then is replaced only with ``overwrite`` and only if it is an earlier output.
    It is moved aside first, so that a complete folder exists at every moment.

    Raises:
        CalibrantError: the disk is full, or the target cannot be written or must not be replaced.
    """
    staging = target.absolute().parent / f".{target.absolute().name}.{os.getpid()}.partial"
    try:
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
        yield staging
        _check_replaceable(target, overwrite)
        replaced = staging.with_suffix(".replaced")
        if target.exists():
            target.rename(replaced)
        staging.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(target, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``target``; rename it to ``target`` at the end, remove it on any failure.

    Raises:
        CalibrantError: the disk is full or the target cannot be written.
    """
    staging = target.absolute().parent / f".{target.absolute().name}.{os.getpid()}.partial"
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        yield staging
        staging.replace(target)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(target, error) from error
    finally:
        staging.unlink(missing_ok=True)


def _cannot_write(target: Path, error: Exception) -> CalibrantError:
    full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error)
    reason = "no space left on the disk, free some or choose another output" if full else str(error)
    return CalibrantError(f"{target}: cannot be written ({reason})")
