"""What GPTQ and SparseGPT share: dead columns, solving order, damping and the factor (methods.md §3.6, §5)."""

from dataclasses import dataclass

import torch

from calibrant.kernels.inverse_factor import inverse_factor


@dataclass(frozen=True)
class Prepared:
    """``weight`` and ``factor`` with columns in solving ``order`` (int64 ``[in]``)."""

    weight: torch.Tensor
    factor: torch.Tensor
    order: torch.Tensor
    damping: float
    dead_columns: int


def prepare(weight: torch.Tensor, hessian: torch.Tensor, damping: float, act_order: bool) -> Prepared:
    """Make dead columns harmless, order by the diagonal if asked (stable, descending), damp and factor.

    Raises:
        NotPositiveDefiniteError: the Hessian cannot be factored.
    """
    hessian, weight = hessian.clone(), weight.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    weight[:, dead] = 0
    order = torch.arange(len(dead), device=weight.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
        hessian, weight = hessian[order][:, order], weight[:, order]
    factor, used = inverse_factor(hessian, damping)
    return Prepared(weight.contiguous(), factor, order, used, int(dead.sum()))


def undo(order: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Columns from solving order back to the layer's."""
    result = torch.empty_like(columns)
    result[:, order] = columns
    return result
