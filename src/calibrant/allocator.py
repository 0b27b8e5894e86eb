"""Keeping the C library's heap from holding on to memory that long runs of large tensors free.

On glibc, blocks under a threshold that grows with use come from one heap, where a freed activation leaves a hole that
the next, slightly larger one cannot use, and peak memory ends far above what is in use. A mapping of its
own for every large block would cost a page fault for each 4 KiB; so blocks stay on the heap up to the largest threshold
there is, and the run returns what was freed where it waits anyway. Elsewhere these functions do nothing.
"""

import ctypes
import platform

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt's parameter numbers
_LARGE_BYTES, _KEPT_BYTES = 32 << 20, 64 << 20
_GLIBC = platform.libc_ver()[0] == "glibc"


def map_large_blocks() -> None:
    """From now on give each block of 32 MiB or more its own mapping, which is returned when it is freed."""
    if _GLIBC:
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def return_freed_memory() -> None:
    """Give freed pages of the heap back to the system."""
    if _GLIBC:
        ctypes.CDLL(None).malloc_trim(0)
