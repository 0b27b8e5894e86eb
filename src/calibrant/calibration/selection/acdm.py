"""ACDM: the texts whose activations are closest to those of target texts (after OpenReview pfw3saHzGU)."""

from collections.abc import Sequence

import numpy as np

from calibrant.calibration.selection.activations import FeedForwardMeans
from calibrant.calibration.selection.model_scores import Scoring
from calibrant.calibration.windows import Window


class Acdm:
    """Ranks candidates by the distance of their activations from the centroids of target texts.

    A target's centroid is the mean of its windows' vectors (``FeedForwardMeans``). A candidate's distance is the
    squared Euclidean distance of its vector from a centroid, averaged over blocks and over ``targets``. What the
    vectors are and how targets are put together is ours (docs/methods.md "Ours").

    Raises:
        CalibrantError: the model has no feed-forward parts.
    """

    def __init__(self, scoring: Scoring, prefix: list[int], targets: Sequence[Sequence[Window]]) -> None:
        self._means = FeedForwardMeans(scoring.load(), prefix)
        self._centroids = [self._means.of(windows).astype(np.float64).mean(0) for windows in targets]
        self._distances = scoring.scores(self._distances_of)

    def see(self, windows: list[Window]) -> None:
        """Run the model over further candidates."""
        self._distances.see(windows)

    def _distances_of(self, windows: list[Window]) -> np.ndarray:
        """Float64 ``[windows]``."""
        apart = [
            [np.square(vector - centroid).sum() for centroid in self._centroids] for vector in self._means.of(windows)
        ]
        return np.array([float(np.mean(one)) / self._means.blocks for one in apart])

    def choose(self, count: int) -> list[int]:
        """The closest candidates, the closest first; of equally close ones the earlier."""
        return [int(index) for index in np.argsort(self._distances.values, kind="stable")[:count]]

    def counts(self) -> dict[str, int]:
        """Nothing."""
        return {}
