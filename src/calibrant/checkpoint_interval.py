"""How often a long piece of work saves its state."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

# The least ratio of the time between two checkpoints to the time of writing one, which so costs under 5 % (ours).
CHECKPOINT_SHARE = 20
# What writing is taken to do before it was measured.
_BYTES_PER_SECOND = 100e6


class CheckpointInterval:
    """Tells when the next checkpoint is due: when 20 times the time that writing the last one took has passed.

    Before the first one, the time is taken that ``state_bytes`` need at 100 MB/s.
    """

    def __init__(self, state_bytes: int) -> None:
        self._since = time.monotonic()
        self._writing = state_bytes / _BYTES_PER_SECOND

    @property
    def due(self) -> bool:
        """Whether enough time has passed."""
        return time.monotonic() - self._since >= CHECKPOINT_SHARE * self._writing

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within, a checkpoint is written."""
        begin = time.monotonic()
        yield
        self._since = time.monotonic()
        self._writing = self._since - begin
