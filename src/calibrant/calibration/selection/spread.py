"""Choice by embeddings: k-centre (Gonzalez 1985) and herding (released code of ZipCal, arXiv 2603.16105)."""

from collections.abc import Callable

import numpy as np

from calibrant.calibration.selection.embeddings import Embedding
from calibrant.calibration.windows import Window


def k_centre(vectors: np.ndarray, count: int, first: int) -> tuple[list[int], list[float]]:
    """Greedy k-centre: repeatedly the point farthest from the chosen ones; ties go to the lower index.

    Args:
        vectors: points ``[points, width]``.
        count: number of points to choose.
        first: index of the first one.

    Returns the indices, beginning with ``first``, and after each choice the squared radius: the largest squared
    Euclidean distance of a point from its nearest chosen one. The radius is at most twice the best (Gonzalez 1985).
    """
    chosen, radii = [first], []
    nearest = _squared_distances(vectors, vectors[first])
    nearest[first] = -1.0
    while len(chosen) < min(count, len(vectors)):
        farthest = int(np.argmax(nearest))
        radii.append(float(max(nearest[farthest], 0.0)))
        chosen.append(farthest)
        nearest = np.minimum(nearest, _squared_distances(vectors, vectors[farthest]))
        nearest[chosen] = -1.0
    radii.append(float(max(nearest.max(), 0.0)))
    return chosen, radii


def _squared_distances(vectors: np.ndarray, point: np.ndarray) -> np.ndarray:
    difference = vectors - point
    squares: np.ndarray = np.einsum("ij,ij->i", difference, difference).astype(np.float64)
    return squares


def herding(vectors: np.ndarray, count: int) -> list[int]:
    """Herding of unit vectors: at step ``t`` the unused point closest to ``t * mean - sum of the chosen``."""
    mean = vectors.mean(axis=0, dtype=np.float64)
    rest = np.zeros_like(mean)
    used = np.zeros(len(vectors), dtype=bool)
    chosen = []
    for step in range(1, min(count, len(vectors)) + 1):
        target = step * mean - rest
        distances = np.einsum("ij,ij->i", vectors, vectors) - 2 * (vectors @ target)
        index = int(np.argmin(np.where(used, np.inf, distances)))
        used[index] = True
        rest += vectors[index]
        chosen.append(index)
    return chosen


class EmbeddingSelector:
    """Embeds candidates and chooses among their vectors by ``choice(vectors, count)``."""

    def __init__(self, embedding: Embedding, choice: Callable[[np.ndarray, int], list[int]]) -> None:
        self._embedding, self._choice = embedding, choice

    def see(self, windows: list[Window]) -> None:
        """Embed further candidates."""
        self._embedding.see(windows)

    def choose(self, count: int) -> list[int]:
        """See ``Selector``."""
        return self._choice(self._embedding.vectors(), count)

    def counts(self) -> dict[str, int]:
        """See ``Selector``."""
        return {}
