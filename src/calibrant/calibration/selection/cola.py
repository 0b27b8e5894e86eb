"""COLA, stage 3: one text from each cluster of the model's activations (arXiv 2510.10618)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers

from calibrant.calibration.windows import Window
from calibrant.modeling.find_blocks import find_blocks
from calibrant.modeling.hooks import hooked

_DIMENSIONS = 64
_STARTS = 10


class Cola:
    """Clusters candidates by their activations and takes the one closest to each centre.

    A candidate's vector is the mean of every block's output over its tokens (the paper: of the feed-forward part's
    output), scaled to length 1 per block, joined over blocks, and projected to 64 dimensions by a matrix of
    ``N(0, 1) / sqrt(64)``. k-means has ten k-means++ starts. For every empty cluster the largest one gives another
    member (ours).
    """

    def __init__(self, model: transformers.PreTrainedModel, prefix: list[int], rng: np.random.Generator) -> None:
        self._model, self._prefix, self._rng = model, prefix, rng
        self._vectors: list[np.ndarray] = []
        self._projection: np.ndarray | None = None
        self._clusters = 0

    @torch.inference_mode()
    def see(self, windows: list[Window]) -> None:
        """Run the model over further candidates."""
        with _block_means(self._model, len(self._prefix)) as means:
            for window in windows:
                means.clear()
                self._model.base_model(
                    input_ids=torch.tensor([self._prefix + window.tokens], device=self._model.device)
                )
                joined = torch.cat([mean / mean.norm().clamp(min=1e-12) for mean in means]).cpu().numpy()
                self._vectors.append(joined @ self._random_projection(len(joined)))

    def _random_projection(self, width: int) -> np.ndarray:
        if self._projection is None:
            normal = self._rng.standard_normal((width, _DIMENSIONS), dtype=np.float32)
            self._projection = normal / np.sqrt(_DIMENSIONS, dtype=np.float32)
        return self._projection

    def choose(self, count: int) -> list[int]:
        """The member closest to each of ``count`` centres, in the clusters' order."""
        vectors = np.stack(self._vectors).astype(np.float64)
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
    from scipy.cluster.vq import kmeans2  # imported here, since it is slow to load

    best: tuple[float, Any, Any] | None = None
    for _ in range(_STARTS):
        centres, labels = kmeans2(points, count, minit="++", rng=rng, missing="warn")
        spread = float(((points - centres[labels]) ** 2).sum())
        if best is None or spread < best[0]:
            best = (spread, centres, labels)
    assert best is not None
    return best[1], best[2]


@contextmanager
def _block_means(model: transformers.PreTrainedModel, skipped: int) -> Iterator[list[torch.Tensor]]:
    """A list to which forward passes append every block's mean output after the first ``skipped`` tokens.

    Means are float32 ``[width]``.
    """
    means: list[torch.Tensor] = []

    def note(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        means.append(hidden[:, skipped:].float().mean(dim=(0, 1)))

    with hooked(((model.get_submodule(name), note) for name in find_blocks(model)), after=True):
        yield means
