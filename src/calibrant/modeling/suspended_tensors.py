"""Tensors of a suspended forward pass in a file, so that memory holds those of one pass at a time."""

import ctypes
import inspect
import io
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from calibrant.errors import CalibrantError, first_line

# Smaller ones are not worth a place in the file.
_LEAST_BYTES = 1 << 12


def tensors_of(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Parameters and buffers of ``modules``, and tensors that their parts keep as attributes."""
    found: list[torch.Tensor] = []
    for module in modules:
        found += [*module.parameters(), *module.buffers()]
        found += [leaf for part in module.modules() for leaf in tree_leaves(vars(part)) if _is_tensor(leaf)]
    return found


def local_tensors(frame: FrameType | None) -> list[torch.Tensor]:
    """Tensors in the local variables of ``frame`` and of the frames that called it."""
    found: list[torch.Tensor] = []
    while frame is not None:
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # a function
            variables = frame.f_locals
            found += [leaf for leaf in tree_leaves(list(variables.values())) if _is_tensor(leaf)]
            if isinstance(variables, dict):  # a copy, before Python 3.13, which would keep the tensors alive
                variables.clear()
        frame = frame.f_back
    return found


class SuspendedTensors:
    """Tensors of one forward pass that ``see`` is told of, in ``file`` while it is suspended.

    Storages move as a whole, so all tensors that share one stay consistent. Those of ``shared`` tensors never move.
    """

    def __init__(self, file: Path, shared: Iterable[torch.Tensor]) -> None:
        self._file = file
        self._shared = {tensor.untyped_storage().data_ptr() for tensor in shared}
        self._seen: list[weakref.ref[torch.Tensor]] = []
        self._moved: list[tuple[torch.UntypedStorage, int]] = []

    def see(self, values: Any) -> None:
        """Note the tensors in ``values``, of the pass."""
        self._seen += [weakref.ref(leaf) for leaf in tree_leaves(values) if _is_tensor(leaf)]

    def move_out(self) -> None:
        """Move what is alive of the noted tensors to the file.

        Raises:
            CalibrantError: the disk fails or is full.
        """
        storages: dict[int, torch.UntypedStorage] = {}
        alive = []
        for reference in self._seen:
            tensor = reference()
            storage = None if tensor is None else tensor.untyped_storage()
            if storage is None or storage.nbytes() == 0:  # released
                continue
            alive.append(reference)
            place = storage.data_ptr()
            if place not in self._shared and storage.resizable() and storage.nbytes() >= _LEAST_BYTES:
                storages[place] = storage
        self._seen = alive
        try:
            with self._file.open("wb") as stream:
                for storage in storages.values():
                    here = storage.cpu()  # held while it is written
                    stream.write(_buffer(here))
        except OSError as error:
            raise CalibrantError(
                f"{self._file}: cannot be written ({first_line(error)}); free some disk, or choose another output"
            ) from error
        self._moved = [(storage, storage.nbytes()) for storage in storages.values()]
        for storage in storages.values():
            storage.resize_(0)

    def move_back(self) -> None:
        """Move everything back.

        Raises:
            CalibrantError: the file cannot be read.
        """
        if not self._moved:
            return
        try:
            with self._file.open("rb", buffering=0) as stream:
                for storage, size in self._moved:
                    storage.resize_(size)
                    here = storage if storage.device.type == "cpu" else torch.UntypedStorage(size)
                    _read_whole(stream, _buffer(here))
                    if here is not storage:
                        storage.copy_(here)
        except (OSError, EOFError) as error:
            raise CalibrantError(f"{self._file}: cannot be read ({first_line(error)}); run again") from error
        self._moved = []

    def forget(self) -> None:
        """Remove the file."""
        self._moved, self._seen = [], []
        self._file.unlink(missing_ok=True)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_meta


def _buffer(storage: torch.UntypedStorage) -> memoryview:
    """The bytes of ``storage``, on the CPU; not through NumPy, after which it could not be resized."""
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def _read_whole(stream: io.RawIOBase, target: memoryview) -> None:
    """Fill ``target``."""
    while target:
        count = stream.readinto(target)
        if not count:
            raise EOFError("it ends early")
        target = target[count:]
