"""COLA, stage 3: one text from each cluster of the model's activations (arXiv 2510.10618)."""

from typing import Any

import numpy as np

from calibrant.calibration.selection.activations import FeedForwardMeans
from calibrant.calibration.selection.model_scores import Scoring
from calibrant.calibration.windows import Window

_DIMENSIONS = 64
_STARTS = 10
# As many as scikit-learn's k-means takes at most, which the released code uses.
_MOST_STEPS = 300


class Cola:
    """Clusters candidates by their activations and takes the one closest to each centre.

    A candidate's vector (``FeedForwardMeans``) is projected to 64 dimensions by a matrix of ``N(0, 1) / sqrt(64)``.
    k-means has ten k-means++ starts and converges. For every empty cluster the largest one gives another member (ours).

    Raises:
        CalibrantError: the model has no feed-forward parts.
    """

    def __init__(self, scoring: Scoring, prefix: list[int], rng: np.random.Generator) -> None:
        self._means = FeedForwardMeans(scoring.load(), prefix)
        self._rng = rng
        normal = rng.standard_normal((self._means.width, _DIMENSIONS), dtype=np.float32)
        self._projection = normal / np.sqrt(_DIMENSIONS, dtype=np.float32)
        self._vectors = scoring.scores(self._vectors_of)
        self._clusters = 0

    def see(self, windows: list[Window]) -> None:
        """Run the model over further candidates."""
        self._vectors.see(windows)

    def _vectors_of(self, windows: list[Window]) -> np.ndarray:
        """Projected vectors, float32 ``[windows, 64]``."""
        # Row by row, so that a vector does not depend on the candidates beside it.
        return np.stack([row @ self._projection for row in self._means.of(windows)])

    def choose(self, count: int) -> list[int]:
        """The member closest to each of ``count`` centres, in the clusters' order."""
        vectors = self._vectors.values.astype(np.float64)
        chosen, self._clusters = closest_to_centres(vectors, count, self._rng)
        return chosen

    def counts(self) -> dict[str, int]:
        """Number of clusters with a member."""
        return {"clusters": self._clusters}


def closest_to_centres(vectors: np.ndarray, count: int, rng: np.random.Generator) -> tuple[list[int], int]:
    """One of ``vectors`` ``[points, width]`` from each of ``count`` clusters, and the number of clusters with a point.

    Equal points are clustered as one, so duplicates are only chosen if there are fewer than ``count`` different points.
    """
    different, first = np.unique(vectors, axis=0, return_index=True)
    centres, labels = _k_means(different, min(count, len(different)), rng)
    distances = ((different - centres[labels]) ** 2).sum(axis=1)
    members = [np.flatnonzero(labels == cluster) for cluster in range(len(centres))]
    ranked = [list(first[own[np.argsort(distances[own], kind="stable")]]) for own in members if len(own)]
    chosen = [int(own.pop(0)) for own in ranked]
    while len(chosen) < count and any(ranked):
        chosen.append(int(max(ranked, key=len).pop(0)))
    if len(chosen) < count:
        rest = np.setdiff1d(np.arange(len(vectors)), chosen)
        chosen += [int(index) for index in rest[: count - len(chosen)]]
    return chosen, sum(len(own) > 0 for own in members)


def _k_means(points: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Centres and labels of the best of ten starts, each run until no label changes."""
    from scipy.cluster.vq import kmeans2  # imported here, since it is slow to load

    best: tuple[float, Any, Any] | None = None
    for _ in range(_STARTS):
        centres, labels = kmeans2(points, count, iter=1, minit="++", rng=rng, missing="warn")
        for _ in range(_MOST_STEPS - 1):
            before = labels
            centres, labels = kmeans2(points, centres, iter=1, minit="matrix", missing="warn")
            if np.array_equal(labels, before):
                break
        spread = float(((points - centres[labels]) ** 2).sum())
        if best is None or spread < best[0]:
            best = (spread, centres, labels)
    assert best is not None
    return best[1], best[2]
