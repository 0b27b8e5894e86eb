"""The solution of a layer problem, as every solver returns it."""

from dataclasses import dataclass, replace

import torch

from calibrant.kernels.grid_rounding import round_to_grid
from calibrant.kernels.row_tiles import row_chunks
from calibrant.quantization.grids import Grid

_COLUMN_BLOCK = 256


@dataclass(frozen=True)
class SolverRecord:
    """What happened while solving: raised damping, rounded rows and fallbacks are recorded, not only logged (ours).

    ``damping`` is what was used, relative to the Hessian's mean diagonal. ``fallback`` is a sentence, None if the
    method itself solved the layer.
    """

    damping: float | None = None
    damping_raised: bool = False
    dead_columns: int = 0
    rows_rounded: int = 0
    outliers: int = 0
    fallback: str | None = None


@dataclass(frozen=True)
class Solution:
    """``weight`` float32 ``[rows, in]``; ``codes`` int8 and their ``grid`` if quantized; ``kept`` bool if pruned.

    ``errors`` float32 ``[rows]``: ``layer_errors`` of the result, if the solver computed them anyway.
    ``outliers`` bool ``[rows, in]``: weights on no grid, from methods that keep some exactly.
    ``rounded`` bool ``[rows]``: rows rounded to nearest because the method's own result had a larger error.
    """

    weight: torch.Tensor
    codes: torch.Tensor | None = None
    grid: Grid | None = None
    kept: torch.Tensor | None = None
    errors: torch.Tensor | None = None
    rounded: torch.Tensor | None = None
    outliers: torch.Tensor | None = None
    record: SolverRecord = SolverRecord()


def layer_errors(weight: torch.Tensor, solved: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Squared output error per row, float32 ``[rows]``: ``diag((W - Q) H (W - Q)^T)``, ``hessian`` H ``[in, in]``."""
    return torch.cat([squared_outputs(weight[rows] - solved[rows], hessian) for rows in row_chunks(weight)])


def squared_outputs(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Squared outputs per row, float32 ``[rows]``: ``diag(W H W^T)``, ``hessian`` H ``[in, in]``."""
    sums = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
    # H is symmetric: products with its lower blocks, doubled off the diagonal, cost little more than half.
    for begin in range(0, hessian.shape[0], _COLUMN_BLOCK):
        end = min(begin + _COLUMN_BLOCK, hessian.shape[0])
        here = weight[:, begin:end]
        product = here @ hessian[begin:end, begin:end]
        product.addmm_(weight[:, end:], hessian[end:, begin:end], alpha=2)
        sums += (product * here).sum(1)
    return sums


def keep_rounded_rows(
    weight: torch.Tensor,
    values: torch.Tensor,
    codes: torch.Tensor,
    grid: Grid,
    hessian: torch.Tensor,
    record: SolverRecord,
) -> Solution:
    """``values`` and ``codes``, with round-to-nearest in each row where its error on ``hessian`` is smaller (ours).

    Rows are independent, so each takes the better of both. Changes ``values`` and ``codes`` in place; the record counts
    the rounded rows.
    """
    errors, rounded = weight.new_empty(len(weight)), torch.empty(len(weight), dtype=torch.bool, device=weight.device)
    for rows in row_chunks(weight):
        nearest_codes, nearest = round_to_grid(weight[rows], grid.scale[rows], grid.zero_point[rows], grid.spec.numbers)
        own_errors = squared_outputs(weight[rows] - values[rows], hessian)
        nearest_errors = squared_outputs(weight[rows] - nearest, hessian)
        worse = own_errors > nearest_errors
        values[rows][worse], codes[rows][worse] = nearest[worse], nearest_codes[worse]
        errors[rows], rounded[rows] = torch.minimum(own_errors, nearest_errors), worse
    record = replace(record, rows_rounded=int(rounded.sum()))
    return Solution(values, codes, grid, errors=errors, rounded=rounded, record=record)
