"""What a model says of the candidates of a selection, kept in the selection's journal."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import transformers

from calibrant.calibration.windows import Window
from calibrant.checkpoint_interval import CheckpointInterval
from calibrant.errors import first_line
from calibrant.journal import Journal
from calibrant.stopping import check_stop, stop_requested

# Begins the names of states in the journal.
SCORES = "scores"


class ModelScores:
    """Scores of all candidates in order, those that an interrupted selection has computed included.

    ``score`` gives an array ``[windows, ...]`` for some windows; ``values`` is one for all of them.

    Raises:
        CalibrantError: the journal is damaged.
    """

    def __init__(self, score: Callable[[list[Window]], np.ndarray], journal: Journal | None, name: str) -> None:
        self._score, self._journal, self._name = score, journal, name
        self._interval = CheckpointInterval(0)
        self._seen, self._known = 0, 0
        self._parts: list[np.ndarray] = []
        state = journal.read(name) if journal is not None else None
        if journal is not None and state is not None:
            try:
                scores = state["scores"].numpy()
                if len(scores) != state["done"]:
                    raise ValueError(f"{len(scores)} scores of {state['done']} candidates")
            except (KeyError, AttributeError, TypeError, ValueError) as error:
                raise journal.damaged(journal.folder, first_line(error)) from error
            self._parts, self._known = [scores], len(scores)

    @property
    def values(self) -> np.ndarray:
        """The scores of all candidates.

        Raises:
            CalibrantError: the journal has scores of other candidates.
        """
        shapes = {part.shape[1:] for part in self._parts}
        if self._journal is not None and (self._seen < self._known or len(shapes) > 1):
            raise self._journal.damaged(self._journal.folder, f"{self._known} scores that are not of these candidates")
        return np.concatenate(self._parts)

    def see(self, windows: list[Window]) -> None:
        """Score the next candidates, unless their scores are known. Candidates must come in the same portions.

        Raises:
            StoppedError: a signal asked to stop; the scores so far are kept.
        """
        self._seen += len(windows)
        if self._seen <= self._known:
            return
        self._parts.append(self._score(windows))
        if self._journal is not None and (self._interval.due or stop_requested()):
            with self._interval.writing():
                values = torch.from_numpy(self.values)
                self._journal.write(self._name, {"done": self._seen, "scores": values})
            check_stop(f"the scores of {self._seen} candidates")


@dataclass
class Scoring:
    """The model that scores candidates, and the journal that keeps the scores; None keeps none."""

    load: Callable[[], transformers.PreTrainedModel]
    journal: Journal | None = None
    _count: int = field(default=0, init=False)

    def scores(self, score: Callable[[list[Window]], np.ndarray]) -> ModelScores:
        """Scores of the next corpus, or of the next group of its documents."""
        self._count += 1
        return ModelScores(score, self.journal, f"{SCORES}-{self._count}")
