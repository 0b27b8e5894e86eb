"""Sparsity patterns."""

from dataclasses import dataclass

import torch

from calibrant.kernels.masks import keep_largest_by_row, pruned_count


@dataclass(frozen=True)
class Sparsity:
    """Either a ``share`` of zeros, or ``pruned`` zeros of every ``of`` consecutive inputs (``2:4`` is 2 of 4)."""

    share: float
    pruned: int = 0
    of: int = 0

    @classmethod
    def n_of_m(cls, kept: int, of: int) -> "Sparsity":
        """``kept:of`` as it is written (2:4 keeps 2 of 4)."""
        return cls((of - kept) / of, of - kept, of)

    @property
    def semi_structured(self) -> bool:
        """Whether the pattern is n:m."""
        return self.of > 0

    def mask_rows(self, scores: torch.Tensor) -> torch.Tensor:
        """Mask (bool ``[rows, in]``) that drops the smallest scores of each row, or of each n:m group."""
        rows, columns = scores.shape
        if self.semi_structured:
            return keep_largest_by_row(scores.reshape(-1, self.of), self.pruned).reshape(rows, columns)
        return keep_largest_by_row(scores, pruned_count(self.share, columns))
