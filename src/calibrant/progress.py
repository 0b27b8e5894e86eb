"""Progress reports of long operations, independent of how they are shown."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One running operation."""

    def advance(self, steps: int = 1) -> None:
        """Mark ``steps`` further steps as done."""


class Progress(Protocol):
    """Receiver of progress reports; the command line draws bars."""

    def task(self, label: str, total: int | None, unit: str = "") -> AbstractContextManager[Task]:
        """Context manager around a task of ``total`` steps, None if the number is unknown; ``unit`` names the steps."""

    def note(self, text: str) -> None:
        """Show one line to the user."""


class _NoTask:
    def advance(self, steps: int = 1) -> None:
        pass


class NoProgress:
    """Discards all progress reports."""

    @contextmanager
    def task(self, label: str, total: int | None, unit: str = "") -> Iterator[Task]:
        yield _NoTask()

    def note(self, text: str) -> None:
        pass
