"""Sparsity targets: a share of zeros, or an n:m pattern."""

from dataclasses import dataclass

import torch

from calibrant.kernels.masks import keep_largest_by_row, pruned_count


@dataclass(frozen=True)
class Sparsity:
    """A ``share`` of zeros; if ``of`` is set, ``pruned`` zeros in every ``of`` consecutive inputs."""

    share: float
    pruned: int = 0
    of: int = 0

    @classmethod
    def n_of_m(cls, kept: int, of: int) -> "Sparsity":
        """The pattern written ``kept:of``: 2:4 keeps 2 of every 4."""
        return cls((of - kept) / of, of - kept, of)

    @classmethod
    def of_text(cls, text: str) -> "Sparsity":
        """The sparsity that recipes write as ``text``: "0.5" or "2:4"."""
        if ":" in text:
            kept, of = text.split(":")
            return cls.n_of_m(int(kept), int(of))
        return cls(float(text))

    @property
    def semi_structured(self) -> bool:
        """Whether the pattern is n:m."""
        return self.of > 0

    def mask_rows(self, scores: torch.Tensor) -> torch.Tensor:
        """Mask (bool ``[rows, in]``) without the smallest scores of each row, or of each n:m group."""
        rows, columns = scores.shape
        if self.semi_structured:
            return keep_largest_by_row(scores.reshape(-1, self.of), self.pruned).reshape(rows, columns)
        return keep_largest_by_row(scores, pruned_count(self.share, columns))
