"""Processes that compress one model together, as torchrun starts them: each has some of the rows.

Sums are taken in the order of ranks, so that equal runs of equally many ranks give equal bytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numba
import torch
import torch.distributed as dist

from calibrant.errors import CalibrantError

# A rank may wait for hours while the first one writes the calibration set.
_TIMEOUT = timedelta(days=7)
_Value = TypeVar("_Value")


class Ranks:
    """This process's number among ``size`` processes; a process that is alone is number 0 of 1."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def joined(cls) -> "Ranks":
        """The ranks that torchrun started this process among; alone if it did not."""
        if not dist.is_available() or not dist.is_torchelastic_launched():
            return cls()
        if not dist.is_initialized():
            cuda = torch.cuda.is_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_TIMEOUT)
            if cuda:
                torch.cuda.set_device(dist.get_node_local_rank() % torch.cuda.device_count())
            # torchrun gives every process a share of the cores through this number, which Numba does not read.
            numba.set_num_threads(min(torch.get_num_threads(), numba.get_num_threads()))
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def part(self, count: int, multiple: int = 1) -> slice:
        """This rank's part of ``count`` items in order; bounds are multiples of ``multiple``, so it may be empty."""
        return self.part_of(self.rank, count, multiple)

    def part_of(self, rank: int, count: int, multiple: int = 1) -> slice:
        """The part of ``rank``."""
        whole = -(-count // multiple)
        bounds = [min(count, whole * one // self.size * multiple) for one in (rank, rank + 1)]
        return slice(*bounds)

    def share(self, value: _Value) -> _Value:
        """The first rank's ``value``."""
        if self.alone:
            return value
        held = [value if self.first else None]
        with _together():
            dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        found: Any = held[0]
        return found  # type: ignore[no-any-return]

    def collect(self, value: _Value) -> list[_Value]:
        """The values of all ranks, in order."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.size
        with _together():
            dist.all_gather_object(found, value)
        return found

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace ``tensor`` by the sum over all ranks, in place, in the order of ranks."""
        if self.alone:
            return
        with _together():
            if self.first:
                received = torch.empty_like(tensor)
                for rank in range(1, self.size):
                    dist.recv(received, src=rank)
                    tensor += received
            else:
                dist.send(tensor, dst=0)
            dist.broadcast(tensor, src=0)

    def largest(self, tensor: torch.Tensor) -> None:
        """Replace ``tensor`` by its largest values over all ranks, in place."""
        if not self.alone:
            with _together():
                dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def joined_rows(self, own: torch.Tensor, count: int, multiple: int) -> torch.Tensor:
        """The ``count`` rows of which every rank has ``own``, its ``part(count, multiple)``."""
        result = own.new_empty(count, *own.shape[1:])
        with _together():
            for rank in range(self.size):
                rows = self.part_of(rank, count, multiple)
                if rows.start == rows.stop:
                    continue
                if rank == self.rank:
                    result[rows] = own
                # The collectives know no booleans.
                sent = result[rows].view(torch.uint8) if own.dtype is torch.bool else result[rows]
                dist.broadcast(sent, src=rank)
        return result

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if not self.alone:
            with _together():
                dist.barrier()


ALONE = Ranks()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # another process has ended, and says why itself
        raise CalibrantError("another rank has ended; its own message says why") from error
