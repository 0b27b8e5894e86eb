"""Packed files: no text packs to less than a hundredth, and files of gzip are unpacked as they are read."""

import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO

from calibrant.errors import CalibrantError

# Prose packs to a quarter and repetitive records to a thirtieth; gzip's limit, for a run of one byte, is 1,032.
_LARGEST_RATIO = 100
_ALWAYS_ALLOWED_BYTES = 32 << 20
_BLOCK_BYTES = 1 << 20


def largest_unpacked(path: Path) -> int:
    """Bytes that ``path`` may unpack to: 32 MiB, or 100 times its size if that is more."""
    return max(_ALWAYS_ALLOWED_BYTES, _LARGEST_RATIO * path.stat().st_size)


def too_large(path: Path) -> CalibrantError:
    """The error for a file that unpacks to more than ``largest_unpacked``."""
    return CalibrantError(
        f"{path}: unpacks to more than {_LARGEST_RATIO} times its size, as no text does; "
        "unpack it yourself if it is one"
    )


def unpacked(path: Path, raw: BinaryIO) -> io.BufferedReader:
    """The bytes of the gzip file ``path``, open as ``raw``.

    Reading raises ``CalibrantError`` beyond ``largest_unpacked``.
    """
    return io.BufferedReader(_Unpacking(path, raw), _BLOCK_BYTES)


class _Unpacking(io.RawIOBase):
    def __init__(self, path: Path, raw: BinaryIO) -> None:
        self._path, self._file = path, gzip.GzipFile(fileobj=raw)
        self._left = largest_unpacked(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read1(len(buffer))
        buffer[: len(data)] = data
        self._left -= len(data)
        if self._left < 0:
            raise too_large(self._path)
        return len(data)
