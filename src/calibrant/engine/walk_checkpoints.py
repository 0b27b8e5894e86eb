"""Saved state of what a walk through the blocks gathers, in the run's journal."""

from collections.abc import Callable, Iterator
from typing import Any

from calibrant.checkpoint_interval import CheckpointInterval
from calibrant.errors import first_line
from calibrant.journal import Journal
from calibrant.modeling.block_walk import BlockWalk, OpenedBlock
from calibrant.progress import Progress
from calibrant.stopping import stop_requested, stopped


class WalkCheckpoints:
    """Visits the blocks of a walk, and saves between them where the walk is and what was found, as state ``name``.

    ``found`` is what an interrupted walk had found, or None; the visit continues behind its last block then. It has the
    types that a journal keeps (``Journal.write``).

    Raises:
        CalibrantError: the journal is damaged.
    """

    def __init__(self, walk: BlockWalk, journal: Journal, name: str) -> None:
        self._walk, self._journal, self._name = walk, journal, name
        self._interval = CheckpointInterval(walk.state_bytes)
        self._done = 0
        self.found: dict[str, Any] | None = None
        state = journal.read(name)
        if state is None:
            return
        try:
            walk.resume(state["done"], state["walk"])
            self._done, self.found = state["done"], state["found"]
        except (KeyError, ValueError, TypeError, OSError) as error:
            raise journal.damaged(journal.folder, first_line(error)) from error

    def visit(self, label: str, found: Callable[[], dict[str, Any]], progress: Progress) -> Iterator[OpenedBlock]:
        """The blocks that are left, each opened in turn; the caller advances the batches.

        ``found`` gives what the caller has found up to the block that it was given last.

        Raises:
            StoppedError: a signal asked to stop; the state is saved.
        """
        walk, count = self._walk, len(self._walk.blocks)
        with progress.task(label, count, "blocks") as task:
            if self._done:
                task.advance(self._done)
                progress.note(f"{label}: continues after block {self._done} of {count}, from {self._journal.folder}")
            for index in range(self._done, count):
                with walk.opened(index) as block:
                    yield block
                self._done = index + 1
                stop = stop_requested() and self._done < count
                if stop or self._interval.due:
                    self._save(found())
                if stop:
                    raise stopped(f"{label}, block {self._done} of {count}")
                task.advance()

    def _save(self, found: dict[str, Any]) -> None:
        with self._interval.writing():
            walk = self._walk.state(self._done)
            state = {"done": self._done, "blocks": len(self._walk.blocks), "walk": walk, "found": found}
            self._journal.write(self._name, state)
            self._walk.release_others(self._done)
