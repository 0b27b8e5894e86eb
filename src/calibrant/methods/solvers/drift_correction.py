"""Drift correction (asymmetric calibration, arXiv 2504.02692): targets that follow the original model's outputs."""

import torch

from calibrant.kernels.inverse_factor import NotPositiveDefiniteError, inverse_factor

_DAMPING = 0.01


def drift_corrected_target(
    weight: torch.Tensor, hessian: torch.Tensor, drift: torch.Tensor, share: float = 1.0
) -> torch.Tensor | None:
    """``W + share W D H^-1``, float32 ``[rows, in]``: the matrix to compress instead of ``weight`` W ``[rows, in]``.

    x is the layer's input in the compressed model, y its input in the original model; ``hessian`` H is ``sum x x^T``
    and ``drift`` D is ``sum (y - x) x^T``, both float32 ``[in, in]``. ``sum |W y - V x|^2`` and
    ``sum |(W + W D H^-1) x - V x|^2`` differ by a constant independent of V, so any solver for the second objective
    solves the first (ours; the paper corrects column by column). D is estimated from finitely many tokens, so a
    ``share`` below 1 can generalize better (ours). H is damped as in GPTQ. None if H cannot be factored.
    """
    try:
        factor, _ = inverse_factor(hessian, _DAMPING)
    except NotPositiveDefiniteError:
        return None
    return weight + share * ((weight @ drift) @ factor.T) @ factor
