"""Masks that keep the largest scores: exact counts, stable order (ours; released codes differ in both)."""

import torch

_SHORT_ROW = 8


def pruned_count(share: float, total: int) -> int:
    """``floor(share total)``, also where the binary product is just below an integer."""
    return int(share * total + 1e-9)


def keep_largest(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Mask (bool, shape of ``scores``) without the ``floor(share n)`` smallest of all; ties drop the earlier."""
    flat = scores.flatten()
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept[torch.argsort(flat, stable=True)[: pruned_count(share, flat.numel())]] = False
    return kept.view(scores.shape)


def largest(values: torch.Tensor, share: float, runs: list[int]) -> torch.Tensor:
    """Mask (bool, shape of ``values``) of the ``round(share n)`` largest magnitudes of each run of rows.

    ``runs`` are the lengths of the runs; ties keep the earlier.
    """
    chosen = []
    for run in values.split(runs):
        flat = torch.zeros(run.numel(), dtype=torch.bool, device=run.device)
        order = torch.argsort(run.flatten().abs(), descending=True, stable=True)
        flat[order[: round(share * run.numel())]] = True
        chosen.append(flat.view_as(run))
    return torch.cat(chosen)


def keep_largest_by_row(scores: torch.Tensor, dropped: int) -> torch.Tensor:
    """Mask (bool ``[rows, n]``) without the ``dropped`` smallest of each row; ties drop the earlier."""
    if scores.shape[1] <= _SHORT_ROW:
        return _rank(scores) >= dropped
    kept = torch.ones_like(scores, dtype=torch.bool)
    return kept.scatter_(1, torch.argsort(scores, dim=1, stable=True)[:, :dropped], False)


def _rank(scores: torch.Tensor) -> torch.Tensor:
    """Rank of each score in its row, ascending and stable; comparing all pairs is faster than sorting short rows."""
    columns = [column.contiguous() for column in scores.unbind(1)]
    ranks = []
    for index, column in enumerate(columns):
        rank = torch.zeros_like(column, dtype=torch.int8)
        for other, against in enumerate(columns):
            if other != index:
                rank += against <= column if other < index else against < column
        ranks.append(rank)
    return torch.stack(ranks, dim=1)
