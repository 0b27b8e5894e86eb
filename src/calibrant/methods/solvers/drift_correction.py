"""Asymmetric calibration: what to solve for so that outputs come close to the original model's (arXiv 2504.02692)."""

import torch

from calibrant.kernels.inverse_factor import NotPositiveDefiniteError, inverse_factor


def drift_corrected_target(
    weight: torch.Tensor, hessian: torch.Tensor, drift: torch.Tensor, share: float = 1.0, damping: float = 0.01
) -> torch.Tensor | None:
    """``W + share W D H^-1``, float32 ``[rows, in]``: what to quantize in the place of ``weight``.

    x is the layer's input in the compressed model, y the original model's; ``hessian`` H is ``sum x x^T``, ``drift`` D
    is ``sum (y - x) x^T``. ``sum |W y - V x|^2`` and ``sum |(W + W D H^-1) x - V x|^2`` differ by what no V changes,
    so any solver for the second solves the first (ours; the paper corrects column by column). D is known from finitely
    many tokens, so a ``share`` below 1 can generalize better (ours). H is damped as in GPTQ; None where it does
    not factor.
    """
    diagonal = hessian.diagonal()
    alive = hessian.clone()
    alive.diagonal().copy_(torch.where(diagonal > 0, diagonal, 1.0))
    try:
        factor, _ = inverse_factor(alive, damping)
    except NotPositiveDefiniteError:
        return None
    return weight + share * ((weight @ drift) @ factor.T) @ factor
