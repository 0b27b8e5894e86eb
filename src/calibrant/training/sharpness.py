"""Sharpness-aware steps: the gradient is taken where, within a radius, the loss rises most (methods.md §20)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

_TINY = 1e-12


@contextmanager
def at_worst_nearby(parameters: Sequence[torch.Tensor], radius: float) -> Iterator[None]:
    """Meanwhile ``parameters`` lie ``radius`` away along their gradients, one global norm; then as before, bit by bit.

    To first order that is where the loss is largest within the radius.
    """
    kept = [parameter.detach().clone() for parameter in parameters]
    _move(parameters, radius)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


@torch.no_grad()
def _move(parameters: Sequence[torch.Tensor], radius: float) -> None:
    """Add ``radius`` times the gradient of global norm 1."""
    length = radius / (gradient_norm(parameters) + _TINY)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.add_(parameter.grad * length)


def gradient_norm(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of all gradients together."""
    norms = [parameter.grad.norm() for parameter in parameters if parameter.grad is not None]
    return torch.stack(norms).norm() if norms else torch.zeros(())
