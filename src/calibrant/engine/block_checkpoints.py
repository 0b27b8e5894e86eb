"""Saved state of a run between two blocks, in the run's journal."""

from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from calibrant.checkpoint_interval import CheckpointInterval
from calibrant.clock import Clock
from calibrant.engine.block_solver import LayerReport
from calibrant.engine.checkpoint_writer import CheckpointWriter
from calibrant.errors import first_line
from calibrant.journal import Journal
from calibrant.modeling.block_walk import BlockWalk
from calibrant.modeling.state_files import StateFiles

NAME = "blocks"
"""Name of the state in the journal."""

ON_DISK = "on_disk"
"""Name of the number in the state that is 1 if hidden states are in files."""

_LAYERS = TypeAdapter(list[LayerReport])


@dataclass
class BlockCheckpoints:
    """The state of a run whose first ``done`` blocks are compressed and written.

    ``layers`` and ``notes`` are those of these blocks. ``restore`` takes up a saved state, ``block_done`` saves one
    where that costs little. The first rank, which has the ``writer``, saves the state; of several ranks each saves the
    walk of its rows before that.
    """

    journal: Journal
    walk: BlockWalk
    writer: CheckpointWriter | None
    clock: Clock
    done: int = 0
    layers: list[LayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._interval = CheckpointInterval(self.walk.state_bytes)

    def restore(self) -> None:
        """Take up the journal's state, if there is one; parts of blocks that it does not know are removed.

        Raises:
            CalibrantError: the journal is damaged.
        """
        ranks = self.walk.ranks
        state = self.journal.read(NAME) if self.writer is not None else None
        done = ranks.share(state["done"] if state is not None else 0)
        if not done:
            if self.writer is not None:
                self.writer.start_empty()
            return
        walk = self.journal.read(self._walk_name(done)) if not ranks.alone else None
        try:
            if state is None or self.writer is None:
                self.done = done
                self.walk.resume(done, walk or {})
                return
            self.walk.resume(done, walk or state["walk"])
            self.writer.resume(state["writer"])
            self.layers, self.notes = _LAYERS.validate_python(state["layers"]), list(state["notes"])
            self.done = state["done"]
        except (KeyError, ValueError, TypeError, OSError) as error:
            raise self.journal.damaged(self.journal.folder, first_line(error)) from error
        self.clock.add(state["seconds"])

    def block_done(self) -> None:
        """Count a block as done, and save the state if enough time has passed since the last one."""
        self.done += 1
        if self.walk.ranks.share(self._interval.due):
            self.save()

    def save(self) -> None:
        """Save the state.

        Raises:
            CalibrantError: it cannot be written.
        """
        with self.clock.stage("journal"), self._interval.writing():
            walk, ranks = self.walk.state(self.done), self.walk.ranks
            if not ranks.alone:
                self.journal.write(self._walk_name(self.done), walk)
                ranks.wait()
            if self.writer is not None:
                self.journal.write(NAME, self._state(self.writer, walk if ranks.alone else {}))
            ranks.wait()
            self.walk.release_others(self.done)
            if not ranks.alone:
                self.journal.drop(self._walk_name("*"), but=self._walk_name(self.done))

    def _walk_name(self, done: int | str) -> str:
        return f"walk-{self.walk.ranks.rank}-{done}"

    def _state(self, writer: CheckpointWriter, walk: dict[str, Any]) -> dict[str, Any]:
        return {
            "done": self.done,
            "blocks": len(self.walk.blocks),
            ON_DISK: int(isinstance(self.walk.batches, StateFiles)),
            "walk": walk,
            "writer": writer.state(),
            "layers": [asdict(layer) for layer in self.layers],
            "notes": self.notes,
            "seconds": self.clock.seconds,
        }
