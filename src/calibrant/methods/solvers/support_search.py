"""Which weights of a pruned layer are zero, and the values of the others, by coordinate descent after SparseGPT."""

from dataclasses import replace

import torch

from calibrant.kernels.masks import keep_largest, pruned_count
from calibrant.kernels.row_tiles import PANEL, row_chunks
from calibrant.kernels.support_descent import pattern_sweep, threshold_sweep
from calibrant.methods.solvers.result import Solution, layer_errors
from calibrant.methods.solvers.sparsity import Sparsity

# Sweeps over the kept weights alone, after the last choice of them (ours).
_VALUE_SWEEPS = 3


def searchable(sparsity: Sparsity) -> bool:
    """Whether ``search_support`` knows the pattern: any share, and n:m where m is 2, 4 or 8."""
    return not sparsity.semi_structured or PANEL % sparsity.of == 0


def search_support(
    weight: torch.Tensor,
    start: Solution,
    hessian: torch.Tensor,
    sparsity: Sparsity,
    sweeps: int,
    segments: tuple[int, ...],
) -> Solution:
    """``start`` with zeros and values of less error on ``hessian`` (ours).

    A sweep visits every weight, or every group of a pattern, and gives it its optimum given all others. Of a pattern
    n:m each group keeps the n weights that lower the error most, which no sweep can raise. Without a pattern a weight
    is kept if it lowers the error by more than a threshold, which is chosen before each sweep such that the share fits;
    afterwards exactly ``floor(p n)`` of the n weights of every matrix are zero, and the kept ones are swept alone. A
    matrix whose error is not lower then keeps its start.

    Args:
        weight: target W, float32 ``[rows, in]``.
        start: a solution with the pattern or share.
        hessian: H, float32 ``[in, in]``, damped, with a positive diagonal.
        sparsity: the pattern or share.
        sweeps: how often the zeros are chosen anew.
        segments: row counts of the matrices stacked by rows (empty: one matrix).
    """
    values = start.weight.clone()
    if sparsity.semi_structured:
        count = sparsity.of - sparsity.pruned
        for rows in row_chunks(weight):
            for _ in range(sweeps):
                values[rows] = pattern_sweep(weight[rows], values[rows], hessian, count, sparsity.of)
        return replace(start, weight=values, kept=values != 0)
    matrices = list(segments or (len(weight),))
    kept = torch.cat(
        [
            _choose(own, found, hessian, sparsity.share, sweeps)
            for own, found in zip(weight.split(matrices), values.split(matrices), strict=True)
        ]
    )
    for rows in row_chunks(weight):
        least = torch.where(kept[rows], -1.0, torch.inf)
        for _ in range(_VALUE_SWEEPS):
            values[rows] = threshold_sweep(weight[rows], values[rows], hessian, least)
    assert start.kept is not None
    parts = (one.split(matrices) for one in (weight, values, kept, start.weight, start.kept))
    for own, found, mask, before, before_mask in zip(*parts, strict=True):
        if not bool(layer_errors(own, found, hessian).sum() < layer_errors(own, before, hessian).sum()):
            found.copy_(before)
            mask.copy_(before_mask)
    return replace(start, weight=values, kept=kept)


def _choose(
    weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor, share: float, sweeps: int
) -> torch.Tensor:
    """Which weights of one matrix ``[rows, in]`` are kept, bool; changes ``values`` in place."""
    pruned = pruned_count(share, weight.numel())
    for _ in range(sweeps if pruned else 0):
        threshold = _gains(weight, values, hessian).flatten().kthvalue(pruned).values
        for rows in row_chunks(weight):
            least = threshold.expand(len(weight[rows]), 1)
            values[rows] = threshold_sweep(weight[rows], values[rows], hessian, least)
    # Of weights that are zero already, those go on being zero that would gain least.
    zeros = -1 / (1 + _gains(weight, values, hessian))
    return keep_largest(torch.where(values == 0, zeros, values.square() * hessian.diagonal()), share)


def _gains(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """How much the error falls when a weight goes from zero to its optimum given all others, float32 ``[rows, in]``."""
    gains, diagonal = torch.empty_like(weight), hessian.diagonal()
    for rows in row_chunks(weight):
        optimum = values[rows] + ((weight[rows] - values[rows]) @ hessian) / diagonal
        gains[rows] = optimum.square_() * diagonal
    return gains
