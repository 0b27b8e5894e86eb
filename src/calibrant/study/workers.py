"""Where the steps of a study run: in processes of this machine, or on a Ray cluster. Workers may die."""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from calibrant.errors import CalibrantError, first_line
from calibrant.executors import start_ray
from calibrant.study.cache import Cache
from calibrant.study.steps import Step
from calibrant.study.worker_process import prepare_process, work

_PATIENCE_SECONDS = 10
_DIED = "the process that ran it died {times} times ({said})"
_SAID = {"SIGKILL": "SIGKILL, as of too little memory"}
_NO_GUARD = 'exit status 1; a script that runs a study needs the line if __name__ == "__main__":'


@dataclass(frozen=True)
class Finished:
    """A step that ended: its number among the steps given, and what it failed of, in a sentence and in full."""

    number: int
    error: str | None = None
    traceback: str | None = None


class Workers(Protocol):
    """Run independent steps."""

    def run(self, steps: Sequence[Step]) -> Generator[Finished]:
        """Run all steps in any order; what fails stops nothing else."""

    def close(self) -> None:
        """End what is kept between runs."""


class LocalWorkers:
    """Processes of this machine, which stay until ``close``: they take seconds to start.

    Args:
        count: processes at a time; they share the processors.
        retries: how often a step is tried again after the process that ran it died.
    """

    def __init__(self, cache: Cache, count: int, retries: int = 1) -> None:
        self._cache, self._count, self._retries = cache, count, retries
        self._threads = max(1, len(os.sched_getaffinity(0)) // count)
        self._processes: list[_Process] = []

    def run(self, steps: Sequence[Step]) -> Generator[Finished]:
        """See ``Workers``."""
        waiting = deque(range(len(steps)))
        deaths = [0] * len(steps)
        try:
            while waiting or self._busy():
                while waiting and len(self._processes) < min(self._count, len(steps)):
                    self._processes.append(_Process(self._cache.folder, self._threads))
                for one in self._processes:
                    if one.number is None and waiting:
                        one.start(waiting.popleft(), steps)
                for one in _ready(self._busy()):
                    number = one.number
                    finished = one.finished()
                    if finished is not None:
                        if waiting:  # before the caller stores what finished, so that the process never waits for that
                            one.start(waiting.popleft(), steps)
                        yield finished
                        continue
                    self._processes.remove(one)
                    if number is not None:
                        deaths[number] += 1
                        if deaths[number] <= self._retries:
                            waiting.appendleft(number)
                        else:
                            yield Finished(number, _DIED.format(said=one.end, times=deaths[number]))
        finally:
            for one in self._busy():
                one.end_it()
                self._processes.remove(one)

    def close(self) -> None:
        """See ``Workers``."""
        while self._processes:
            self._processes.pop().end_it()

    def _busy(self) -> list["_Process"]:
        return [one for one in self._processes if one.number is not None]


class _Process:
    """One worker process and the step it runs."""

    def __init__(self, cache: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.number: int | None = None
        self._process: BaseProcess = context.Process(target=work, args=(theirs, cache, threads), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def end(self) -> str:
        """How the process ended."""
        self._process.join()
        code = self._process.exitcode or 0
        if code >= 0:
            return _NO_GUARD if code == 1 else f"exit status {code}"
        name = signal.Signals(-code).name
        return _SAID.get(name, name)

    def start(self, number: int, steps: Sequence[Step]) -> None:
        """Send the step with that number."""
        self.number = number
        with contextlib.suppress(BrokenPipeError):  # it died; its connection says so next
            self.connection.send((number, steps[number]))

    def finished(self) -> Finished | None:
        """What the process sent, None if it died."""
        try:
            found: Finished = self.connection.recv()
        except (EOFError, ConnectionResetError):
            return None
        self.number = None
        return found

    def end_it(self) -> None:
        """End the process: one that runs no step ends by itself."""
        self.connection.close()
        if self.number is None:
            self._process.join(_PATIENCE_SECONDS)
        self._process.kill()
        self._process.join()


def _ready(running: list[_Process]) -> list[_Process]:
    connections = wait([one.connection for one in running])
    return [one for one in running if one.connection in connections]


def run_step(number: int, step: Step, cache: Path) -> Finished:
    """Run a step in this process."""
    try:
        step.run(Cache(cache))
    except CalibrantError as error:
        return Finished(number, str(error))
    except Exception as error:  # one cell's failure must not stop the others, whatever it is
        return Finished(number, f"{type(error).__name__}: {first_line(error)}", traceback.format_exc())
    return Finished(number)


class RayWorkers:
    """Tasks of a Ray cluster; every node needs the models, texts and the cache under the same paths.

    Args:
        processors, devices: what each step needs of a node.
        retries: how often a step is tried again after its worker died.

    Raises:
        CalibrantError: Ray is not installed or cannot be started.
    """

    def __init__(self, cache: Cache, processors: int, devices: int, retries: int = 3) -> None:
        self._ray: Any = start_ray()
        self._cache, self._processors = cache, processors
        options = {"num_cpus": processors, "num_gpus": devices, "max_retries": retries}
        self._remote = self._ray.remote(**options)(_run_on_ray)

    def run(self, steps: Sequence[Step]) -> Generator[Finished]:
        """See ``Workers``."""
        running = {
            self._remote.remote(number, step, self._cache.folder.absolute(), self._processors): number
            for number, step in enumerate(steps)
        }
        try:
            while running:
                ready, _ = self._ray.wait(list(running))
                for one in ready:
                    number = running.pop(one)
                    try:
                        yield self._ray.get(one)
                    except self._ray.exceptions.RayError as error:
                        yield Finished(number, f"its Ray worker died ({first_line(error)})")
        finally:
            for one in running:
                self._ray.cancel(one, force=True)

    def close(self) -> None:
        """See ``Workers``; the cluster stays as it is."""


def _run_on_ray(number: int, step: Step, cache: Path, threads: int) -> Finished:
    prepare_process(threads)
    return run_step(number, step, cache)
