"""Choosing by embeddings: points that leave none far away, or whose mean is the mean of all (methods.md §30)."""

from collections.abc import Callable

import numpy as np

from calibrant.calibration.selection.embeddings import Embedding
from calibrant.calibration.windows import Window


def k_centre(vectors: np.ndarray, count: int, first: int) -> tuple[list[int], list[float]]:
    """Greedy k-centre: each time the point farthest from all chosen ones, squared Euclidean, ties to the lower index.

    Returns the indices, ``first`` leading, and after each the largest squared distance left (the squared radius). At
    most twice the best radius (Gonzalez 1985).
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
    """Kernel herding: at step ``t`` the unused point closest to ``t * mean - sum of the chosen``; unit vectors."""
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
    """Shows candidates to an embedding and chooses among its vectors."""

    def __init__(self, embedding: Embedding, choice: Callable[[np.ndarray, int], list[int]]) -> None:
        self._embedding, self._choice = embedding, choice

    def see(self, windows: list[Window]) -> None:
        """Embed further candidates."""
        self._embedding.see(windows)

    def choose(self, count: int) -> list[int]:
        """What ``choice`` picks."""
        return self._choice(self._embedding.vectors(), count)

    def counts(self) -> dict[str, int]:
        """Nothing to add."""
        return {}
