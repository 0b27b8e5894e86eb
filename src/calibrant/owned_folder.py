"""Temporary folders that belong to a living process; what killed processes left behind is found and removed.

The owner holds a lock (``flock``) on a file in its folder, which the system releases however the process ends. Process
numbers would not do: they repeat, and in containers every process may be number 1.
"""

import fcntl
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What is in this subfolder of an owned folder is removed by nobody but the owner.
KEPT = "replaced"
_LOCK = "calibrant.lock"
_ENDING = ".partial"
# Leaves room for a dot, a random part and the ending in the 255 bytes of a file name.
_LONGEST_NAME = 200
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def owned_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new folder ``.NAME.*.partial`` in ``parent``; remove it at the end, unless ``KEPT`` is in it.

    Raises:
        OSError: ``parent`` cannot be written.
    """
    short = os.fsdecode(os.fsencode(name)[:_LONGEST_NAME])
    folder = Path(tempfile.mkdtemp(prefix=f".{short}.", suffix=_ENDING, dir=parent))
    lock = None
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        # The file says something only once it is locked: an empty one is never taken for an abandoned one.
        if _try_lock(lock):
            os.write(lock, _boot().encode())
        yield folder
    finally:
        if lock is not None:
            os.close(lock)
        if not (folder / KEPT).exists():
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path) -> None:
    """Remove the folders of ``owned_folder`` in ``parent`` whose owners have ended; those in doubt stay."""
    try:
        with os.scandir(parent) as entries:
            found = [Path(entry.path) for entry in entries if is_owned(entry.name)]
    except OSError:
        return
    for folder in found:
        if not folder.is_symlink() and not (folder / KEPT).exists() and _is_abandoned(folder / _LOCK):
            shutil.rmtree(folder, ignore_errors=True)


def is_owned(name: str) -> bool:
    """Whether folders of ``owned_folder`` have names like this."""
    return name.startswith(".") and name.endswith(_ENDING)


def _is_abandoned(file: Path) -> bool:
    try:
        lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        owner = os.read(lock, 1000).decode(errors="replace")
        # A network file system may keep locks within each machine, so that those of others look free. File systems on
        # a local disk have a device number with a major part.
        local = os.major(os.fstat(lock).st_dev) != 0
        return bool(owner) and (local or owner == _boot()) and _try_lock(lock)
    except OSError:
        return False
    finally:
        os.close(lock)


def _try_lock(descriptor: int) -> bool:
    """Lock the file; False if another process holds the lock, or the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _boot() -> str:
    """What is the same for all processes, in all containers, of a machine since it was started."""
    return _BOOT.read_text(encoding="ascii").strip() if _BOOT.is_file() else platform.node()
