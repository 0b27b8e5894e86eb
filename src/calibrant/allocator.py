"""glibc's heap, tuned so that long runs of large tensors do not accumulate freed memory.

glibc allocates blocks below a threshold that grows with use from one heap. A freed activation leaves a hole there that
the next, slightly larger one cannot use, and peak memory ends far above the memory in use. A separate mapping for every
large block would cost a page fault per 4 KiB, so blocks stay on the heap up to glibc's largest threshold, and the run
returns freed memory at points where it waits anyway. Without glibc these functions do nothing.
"""

import ctypes
import platform

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # parameter numbers of mallopt
_LARGE_BYTES, _KEPT_BYTES = 32 << 20, 64 << 20
_GLIBC = platform.libc_ver()[0] == "glibc"


def map_large_blocks() -> None:
    """Give each later block of 32 MiB or more a separate mapping, which returns to the system when it is freed."""
    if _GLIBC:
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def return_freed_memory() -> None:
    """Return freed pages of the heap to the system."""
    if _GLIBC:
        ctypes.CDLL(None).malloc_trim(0)
