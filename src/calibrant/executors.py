"""Executors of independent work: in this process, one item after the other, or on a Ray cluster."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

from calibrant.errors import CalibrantError

ExecutorName = Literal["local", "ray"]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Executor(Protocol):
    """Runs a function on many items."""

    @property
    def slots(self) -> int:
        """Number of items that can run at the same time."""

    def map(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """Results in the items' order; the first error ends the run."""


class LocalExecutor:
    """Runs one item after the other in this process; each may use all cores."""

    slots = 1

    def map(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """See ``Executor``."""
        return [function(item) for item in items]


class RayExecutor:
    """Runs tasks of one processor each on the Ray cluster of this process, or on a new one on this machine.

    Tasks read their inputs where they run, so every node needs the files under the same paths.

    Raises:
        CalibrantError: Ray is not installed or cannot be started.
    """

    def __init__(self) -> None:
        self._ray: Any = start_ray()

    @property
    def slots(self) -> int:
        """Number of processors in the cluster."""
        resources: dict[str, float] = self._ray.cluster_resources()
        return max(1, int(resources.get("CPU", 1)))

    def map(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """See ``Executor``."""
        remote = self._ray.remote(num_cpus=1)(function)
        try:
            return list(self._ray.get([remote.remote(item) for item in items]))
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, CalibrantError):
                raise error.cause from error
            raise


def start_ray() -> Any:
    """The library Ray, connected to the cluster of this process, or to a new one on this machine.

    Raises:
        CalibrantError: Ray is not installed or cannot be started.
    """
    try:
        import ray
    except ImportError as error:
        raise CalibrantError("the Ray executor needs the extra: pip install 'calibrant[cluster]'") from error
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises many unrelated classes if there is no cluster
            raise CalibrantError(f"Ray cannot be started or reached ({error})") from error
    return ray


def make_executor(name: str) -> Executor:
    """The executor with that name, "local" or "ray".

    Raises:
        CalibrantError: there is no such executor, or it cannot be started.
    """
    if name == "local":
        return LocalExecutor()
    if name == "ray":
        return RayExecutor()
    raise CalibrantError(f"{name}: no executor of that name; there are local, ray")
