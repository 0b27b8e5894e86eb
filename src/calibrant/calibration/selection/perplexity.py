"""Choice by perplexity under a model: the lowest, a middle band, or any below a percentile (arXiv 2410.17711)."""

import math

import numpy as np
import torch

from calibrant.calibration.selection.model_scores import Scoring
from calibrant.calibration.windows import Window
from calibrant.errors import CalibrantError
from calibrant.modeling.losses import row_losses


class PerplexitySelector:
    """Scores every candidate with the model of ``scoring`` and chooses by rank.

    ``keep`` "lowest" takes the smallest perplexities (released code of ZipCal), "middle" those nearest to the median
    rank (ours), and "below" draws uniformly among candidates strictly below ``percentile`` (arXiv 2410.17711: 80).
    Windows get ``prefix`` in front; without one, the first token has no context and does not count.
    """

    def __init__(
        self,
        scoring: Scoring,
        prefix: list[int],
        keep: str,
        percentile: float,
        rng: np.random.Generator,
    ) -> None:
        self._prefix = prefix
        self._model, self._keep, self._percentile, self._rng = scoring.load(), keep, percentile, rng
        self._losses = scoring.scores(self._losses_of)
        self._left = 0

    def see(self, windows: list[Window]) -> None:
        """Score further candidates."""
        self._losses.see(windows)

    def _losses_of(self, windows: list[Window]) -> np.ndarray:
        """The mean negative log-likelihood of each window in nats, float64 ``[windows]``."""
        found = []
        for window in windows:
            tokens = torch.tensor([self._prefix + window.tokens])
            loss = row_losses(self._model, tokens, torch.ones_like(tokens, dtype=torch.bool))[0]
            found.append(loss if math.isfinite(loss) else math.inf)
        return np.array(found)

    def choose(self, count: int) -> list[int]:
        """The chosen candidates, from low to high perplexity; for "below" in random order.

        Raises:
            CalibrantError: fewer than ``count`` are below the percentile.
        """
        losses = self._losses.values
        order = np.argsort(losses, kind="stable")
        if self._keep == "lowest":
            return [int(index) for index in order[:count]]
        if self._keep == "middle":
            begin = (len(order) - count) // 2
            return [int(index) for index in order[begin : begin + count]]
        below = np.flatnonzero(losses < np.percentile(losses, self._percentile))
        self._left = len(below)
        if len(below) < count:
            raise CalibrantError(
                f"only {len(below)} of {len(losses)} candidates are below percentile {self._percentile:g} of the "
                f"perplexity, {count} are needed; raise `percentile` or use fewer samples"
            )
        return [int(index) for index in self._rng.permutation(below)[:count]]

    def counts(self) -> dict[str, int]:
        """Number of candidates below the percentile."""
        return {"below_percentile": self._left} if self._keep == "below" else {}
