"""Sharpness-aware minimization: gradients at the worst nearby parameters (arXiv 2010.01412, equation 2)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from calibrant.modeling.hooks import swapped

_TINY = 1e-12


def at_worst_nearby(parameters: Sequence[torch.Tensor], rho: float) -> AbstractContextManager[None]:
    """Within the context, move ``parameters`` by ``rho`` along their gradient, normalized by its global norm.

    To first order, the loss is largest there within the radius ``rho``.
    """
    with torch.no_grad():
        length = rho / (gradient_norm(parameters) + _TINY)
        moved = [(one, one + one.grad * length) for one in parameters if one.grad is not None]
    return swapped(moved)


def gradient_norm(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Global L2 norm of the gradients of ``parameters``."""
    norms = [parameter.grad.norm() for parameter in parameters if parameter.grad is not None]
    return torch.stack(norms).norm() if norms else torch.zeros(())
