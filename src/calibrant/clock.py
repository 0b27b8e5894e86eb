"""Timing of the stages of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds per stage; the time of a nested stage does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = time.perf_counter()

    def add(self, seconds: dict[str, float]) -> None:
        """Add the stages of an earlier part of the same run."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time spent in the context for stage ``name``."""
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
