"""Memory of this process."""

import resource
import sys
from pathlib import Path

_STATM = Path("/proc/self/statm")


def peak_memory() -> int:
    """Peak memory of the process in bytes; ``ru_maxrss`` is in bytes on macOS and in KiB elsewhere."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int:
    """Memory of the process now, in bytes; where the system does not tell, the peak."""
    if not _STATM.is_file():
        return peak_memory()
    pages = int(_STATM.read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()
