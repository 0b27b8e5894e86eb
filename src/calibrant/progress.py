"""How long work reports where it is, without knowing who listens."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, steps: int = 1) -> None:
        """Count ``steps`` more as done."""


class Progress(Protocol):
    """Receiver of progress; the command line draws bars, a library call may pass nothing."""

    def task(self, label: str, total: int | None) -> AbstractContextManager[Task]:
        """Open a task of ``total`` steps, or None where nobody knows how many; used as a context manager."""

    def note(self, text: str) -> None:
        """Say one line that the user should see."""


class _NoTask:
    def advance(self, steps: int = 1) -> None:
        pass


class NoProgress:
    """Progress that goes nowhere."""

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Task]:
        yield _NoTask()

    def note(self, text: str) -> None:
        pass
