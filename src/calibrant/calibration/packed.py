"""Files packed with gzip, unpacked as they are read and no further than text can be packed."""

import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO

from calibrant.errors import CalibrantError

# Prose packs to a quarter and repetitive records to a thirtieth; gzip's limit, for a run of one byte, is 1,032.
_LARGEST_RATIO = 100
_ALWAYS_ALLOWED_BYTES = 32 << 20
_BLOCK_BYTES = 1 << 20


def unpacked(path: Path, raw: BinaryIO) -> BinaryIO:
    """The bytes of the gzip file ``path``, open as ``raw``.

    Reading raises ``CalibrantError`` beyond 32 MiB and 100 times the file's size.
    """
    return io.BufferedReader(_Unpacking(path, raw), _BLOCK_BYTES)


class _Unpacking(io.RawIOBase):
    def __init__(self, path: Path, raw: BinaryIO) -> None:
        self._path, self._file = path, gzip.GzipFile(fileobj=raw)
        self._left = max(_ALWAYS_ALLOWED_BYTES, _LARGEST_RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read1(len(buffer))
        buffer[: len(data)] = data
        self._left -= len(data)
        if self._left < 0:
            raise CalibrantError(
                f"{self._path}: unpacks to more than {_LARGEST_RATIO} times its size, as no text does; "
                "unpack it yourself if it is one"
            )
        return len(data)
