"""Memory of this process, and how much of it a run may use."""

import re
import resource
import sys
from pathlib import Path

import psutil
import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from calibrant.errors import CalibrantError

_STATM, _STATUS = Path("/proc/self/statm"), Path("/proc/self/status")
_PEAK = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)
_SIZE = re.compile(r"\s*\d{1,20}(\.\d{1,20})?\s*[a-zA-Z]{0,3}\s*")
_GROUPS = Path("/proc/self/cgroup")
# Where the two versions of control groups are mounted, and their files of the limit and of the memory in use.
_LIMITS = {
    "": (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def peak_memory() -> int:
    """Peak memory of the process in bytes.

    ``ru_maxrss`` serves where the system tells nothing better: it includes the peak of the program that started this
    one, and is in bytes on macOS and in KiB elsewhere.
    """
    if _STATUS.is_file():
        found = _PEAK.search(_STATUS.read_text(encoding="utf-8"))
        if found is not None:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int:
    """Memory of the process now, in bytes; where the system does not tell, the peak."""
    if not _STATM.is_file():
        return peak_memory()
    pages = int(_STATM.read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def usable_memory(device: torch.device) -> int:
    """Bytes that this process may have in all: what it has, and what is free for tensors on ``device``.

    On the CPU that is what the system and the process's control groups leave.
    """
    if device.type == "cuda":
        return resident_memory() + torch.cuda.mem_get_info(device)[0]
    return resident_memory() + min([psutil.virtual_memory().available, *_left_in_groups()])


def memory_size(size: str | int) -> int:
    """Bytes of ``size``, such as "6GB", "512 MiB" or a number of bytes.

    Raises:
        CalibrantError: it is not a size.
    """
    text = str(size)
    try:
        # ByteSize itself takes what follows the unit for nothing.
        found = int(TypeAdapter(ByteSize).validate_python(text)) if _SIZE.fullmatch(text) else 0
    except ValidationError:
        found = 0
    if found <= 0:
        raise CalibrantError(f"{text[:40]}: is no amount of memory; write it as 6GB or 512MB")
    return found


def _left_in_groups() -> list[int]:
    """Bytes that each control group of this process, and each group around it, leaves; page cache counts as free."""
    left = []
    lines = _GROUPS.read_text(encoding="utf-8").splitlines() if _GROUPS.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in _LIMITS:
            continue
        root, limit_name, used_name = _LIMITS[controllers]
        group = root / path.lstrip("/")
        for folder in [group, *group.parents]:
            if not folder.is_relative_to(root):
                break
            try:
                limit, used = (folder / limit_name).read_text().strip(), int((folder / used_name).read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:  # the root has no limit, and containers do not see groups around them
                continue
            if limit.isdigit():
                cache = sum(int(statistics.get(name, 0)) for name in ("active_file", "inactive_file"))
                left.append(int(limit) - used + cache)
    return left
