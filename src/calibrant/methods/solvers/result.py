"""The solution of a layer problem, as every solver returns it."""

from dataclasses import dataclass, replace

import torch

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
    difference = weight - solved
    errors = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
    # H is symmetric: products with its lower blocks, doubled off the diagonal, cost little more than half.
    for begin in range(0, hessian.shape[0], _COLUMN_BLOCK):
        end = min(begin + _COLUMN_BLOCK, hessian.shape[0])
        here = difference[:, begin:end]
        product = here @ hessian[begin:end, begin:end]
        product.addmm_(difference[:, end:], hessian[end:, begin:end], alpha=2)
        errors += (product * here).sum(1)
    return errors


def keep_rounded_rows(
    weight: torch.Tensor,
    values: torch.Tensor,
    codes: torch.Tensor,
    rounded: Solution,
    hessian: torch.Tensor,
    record: SolverRecord,
) -> Solution:
    """``values`` and ``codes``, with round-to-nearest in each row where its error on ``hessian`` is smaller (ours).

    Rows are independent, so each takes the better of both. Changes ``values`` and ``codes`` in place; the record counts
    the rounded rows.
    """
    assert rounded.codes is not None
    errors, rounded_errors = layer_errors(weight, values, hessian), layer_errors(weight, rounded.weight, hessian)
    worse = errors > rounded_errors
    values[worse], codes[worse] = rounded.weight[worse], rounded.codes[worse]
    record = replace(record, rows_rounded=int(worse.sum()))
    return Solution(
        values, codes, rounded.grid, errors=torch.minimum(errors, rounded_errors), rounded=worse, record=record
    )
