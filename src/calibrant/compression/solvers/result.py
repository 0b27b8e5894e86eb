"""What every solver returns."""

from dataclasses import dataclass

import torch

from calibrant.compression.grids import Grid


@dataclass(frozen=True)
class SolverRecord:
    """What happened while solving; fallbacks are data (methods.md §3.10)."""

    damping: float | None = None
    damping_raised: bool = False
    dead_columns: int = 0
    rows_rounded: int = 0
    fallback: str | None = None


@dataclass(frozen=True)
class Solution:
    """``weight`` float32 ``[rows, in]``; ``codes`` int8 and their ``grid`` if quantized; ``kept`` bool if pruned.

    ``rounded`` bool ``[rows]``: rows for which a better-than-nearest rounding was tried and round-to-nearest kept.
    """

    weight: torch.Tensor
    codes: torch.Tensor | None = None
    grid: Grid | None = None
    kept: torch.Tensor | None = None
    rounded: torch.Tensor | None = None
    record: SolverRecord = SolverRecord()


def layer_errors(weight: torch.Tensor, solved: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """``diag((W - Q) S (W - Q)^T)`` of every row, float32 ``[rows]``: the layer's squared output error by row."""
    difference = weight - solved
    return ((difference @ hessian) * difference).sum(1)
