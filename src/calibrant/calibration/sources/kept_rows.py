"""Rows that a model writes, kept in a run's journal."""

from dataclasses import dataclass

from calibrant.calibration.sources.text_generation import Written
from calibrant.journal import Journal
from calibrant.stopping import check_stop

ROWS = "rows"
"""Begins the names of states in the journal."""


@dataclass(frozen=True)
class RowsInJournal:
    """Rows that a run has written so far, in states of its ``journal`` that begin with ``name``."""

    journal: Journal
    name: str

    def read(self, first: int, count: int) -> Written | None:
        """See ``KeptRows``."""
        state = self.journal.read(f"{self.name}-{first}-{count}")
        return None if state is None else Written(state["tokens"], state["losses"], state["starts"])

    def write(self, first: int, rows: Written) -> None:
        """See ``KeptRows``.

        Raises:
            StoppedError: a signal asked to stop; the rows are kept.
        """
        state = {"tokens": rows.tokens, "losses": rows.losses, "starts": rows.starts}
        self.journal.write(f"{self.name}-{first}-{len(rows.tokens)}", state)
        check_stop(f"{first + len(rows.tokens)} rows of the calibration set")
