"""Hidden states between two blocks in files, so that memory holds those of one micro-batch at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from calibrant.errors import CalibrantError, first_line
from calibrant.hashing import sha256_file
from calibrant.modeling.inputs import Carried, MicroBatch
from calibrant.output_folder import sync

_HIDDEN, _ORIGINAL, _OUTPUT, _SUSPENDED = "hidden", "original", "output", "suspended"


@dataclass
class _FiledBatch(MicroBatch):
    """A micro-batch read from ``files``, whose states go back there when it advances."""

    files: "StateFiles | None" = None
    position: int = 0

    def advance(self, hidden: torch.Tensor, original: torch.Tensor | None = None) -> None:
        super().advance(hidden, original)
        assert self.files is not None
        self.files.put(self.position, self)


class TensorFiles(Sequence[torch.Tensor]):
    """Tensors in files of ``folder``, each of which is read when it is asked for."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._like: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self._like)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return _read(self._file(index % len(self)), self._like[index])

    def append(self, tensor: torch.Tensor) -> None:
        """Write ``tensor``.

        Raises:
            CalibrantError: the disk fails or is full.
        """
        self._like.append(_shape_of(tensor))
        _write(self._file(len(self) - 1), tensor)

    def _file(self, position: int) -> Path:
        return self._folder / f"{position:06d}-{self._name}.{_OUTPUT}"


class StateFiles(Sequence[MicroBatch]):
    """Micro-batches whose hidden states are in files of ``folder``: each is read when it is asked for.

    The states that enter block n are of generation n. ``keep`` makes a generation outlive later ones until another is
    kept, so that a run can go on from it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: int | None = None
        # Without their states; ``_generations`` says which were written last.
        self._batches: list[MicroBatch] = []
        self._generations: list[int] = []
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[MicroBatch]: ...
    def __getitem__(self, index: int | slice) -> MicroBatch | list[MicroBatch]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        bare = self._batches[index]
        position = index % len(self)
        generation = self._generations[position]
        hidden = _read(self._file(position, generation, _HIDDEN), bare.hidden)
        original = bare.original
        if original is not None:
            original = _read(self._file(position, generation, _ORIGINAL), original)
        return _FiledBatch(
            hidden, bare.mask, bare.calls, original, bare.carried, bare.returned, files=self, position=position
        )

    def __iter__(self) -> Iterator[MicroBatch]:
        return (self[position] for position in range(len(self)))

    def append(self, batch: MicroBatch) -> None:
        """Add a batch that enters block 0; its states are written.

        Raises:
            CalibrantError: they cannot be written.
        """
        self._batches.append(_bare(batch))
        self._generations.append(0)
        self._write(len(self) - 1, batch)

    def put(self, position: int, batch: MicroBatch) -> None:
        """Write the states of ``batch``, the one at ``position`` behind one more block.

        Raises:
            CalibrantError: they cannot be written.
        """
        before = self._generations[position]
        self._batches[position] = _bare(batch)
        self._generations[position] = before + 1
        self._write(position, batch)
        if before != self._kept:
            self._remove(position, before)

    @property
    def nbytes(self) -> int:
        """Bytes of all hidden states."""
        return sum(batch.nbytes for batch in self._batches)

    @property
    def carried(self) -> list[dict[Carried, Any]]:
        """``MicroBatch.carried`` of every batch."""
        return [batch.carried for batch in self._batches]

    def collector(self, name: str = "block") -> TensorFiles:
        """An empty sequence for one tensor per batch; two at a time need different names."""
        return TensorFiles(self._folder, name)

    def suspended_file(self, position: int, name: str) -> Path:
        """Where the tensors of a suspended forward pass of the batch at ``position`` may go."""
        return self._folder / f"{position:06d}-{name}.{_SUSPENDED}"

    def keep(self, generation: int) -> dict[str, str]:
        """Wait until the states of ``generation``, the latest, are on the disk; returns their hashes by file.

        Raises:
            CalibrantError: the disk fails.
        """
        hashes: dict[str, str] = {}
        try:
            for position in range(len(self)):
                for file in self._files(position, generation):
                    sync(file)
                    hashes[file.name] = sha256_file(file)
            sync(self._folder)
            return hashes
        except OSError as error:
            raise CalibrantError(f"{self._folder}: cannot be written ({first_line(error)})") from error

    def release_others(self, generation: int) -> None:
        """Let the states of ``generation`` stay until others are kept, and remove those that were kept before."""
        before, self._kept = self._kept, generation
        if before is not None and before != generation:
            for position in range(len(self)):
                self._remove(position, before)

    def resume(self, generation: int, carried: list[dict[Carried, Any]], hashes: dict[str, str]) -> None:
        """Take up the states of ``generation``, which an earlier run kept, with ``carried``; others are removed.

        Raises:
            ValueError: a file is missing or does not have its hash.
        """
        for batch, values in zip(self._batches, carried, strict=True):
            batch.carried = values
        self._generations = [generation] * len(self)
        self._kept = generation
        wanted = {file for position in range(len(self)) for file in self._files(position, generation)}
        for file in sorted(wanted):
            if not file.is_file() or sha256_file(file) != hashes.get(file.name):
                raise ValueError(f"{file.name} is missing or has changed")
        for name in (_HIDDEN, _ORIGINAL, _OUTPUT, _SUSPENDED):
            for file in self._folder.glob(f"*.{name}"):
                if file not in wanted:
                    file.unlink()

    def _files(self, position: int, generation: int) -> list[Path]:
        names = [_HIDDEN] if self._batches[position].original is None else [_HIDDEN, _ORIGINAL]
        return [self._file(position, generation, name) for name in names]

    def _file(self, position: int, generation: int, name: str) -> Path:
        return self._folder / f"{position:06d}-{generation:04d}.{name}"

    def _write(self, position: int, batch: MicroBatch) -> None:
        generation = self._generations[position]
        for name, tensor in (_HIDDEN, batch.hidden), (_ORIGINAL, batch.original):
            if tensor is not None:
                _write(self._file(position, generation, name), tensor)

    def _remove(self, position: int, generation: int) -> None:
        for file in self._files(position, generation):
            file.unlink(missing_ok=True)


def _bare(batch: MicroBatch) -> MicroBatch:
    """``batch`` with tensors of the shapes of its states that take no memory."""
    hidden = _shape_of(batch.hidden)
    original = None if batch.original is None else _shape_of(batch.original)
    return MicroBatch(hidden, batch.mask, batch.calls, original, batch.carried, batch.returned)


def _write(file: Path, tensor: torch.Tensor) -> None:
    try:
        tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tofile(file)
    except OSError as error:
        raise CalibrantError(
            f"{file}: cannot be written ({first_line(error)}); free some disk, or choose another output"
        ) from error


def _read(file: Path, like: torch.Tensor) -> torch.Tensor:
    """The tensor in ``file``, of the dtype, shape and device of ``like``."""
    try:
        values = torch.empty(like.shape, dtype=like.dtype)  # its storage can be resized
        stored = torch.from_numpy(np.fromfile(file, dtype=np.uint8))
        values.view(-1).view(torch.uint8).copy_(stored)
    except (OSError, RuntimeError) as error:
        raise CalibrantError(f"{file}: cannot be read ({first_line(error)}); run again") from error
    return values.to(like.device)


def _shape_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(()).expand(tensor.shape)
