"""The upper factor ``U`` of the inverse, ``H^-1 = U^T U``, by one Cholesky factorization (methods.md §5)."""

import torch

_RETRIES = 3


class NotPositiveDefiniteError(Exception):
    """The matrix could not be factored at any damping that was tried."""


def inverse_factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Factor ``hessian + damping * mean(diag) * I``; both float32 ``[n, n]``.

    With ``J`` the reversal, ``J H J = L L^T`` gives ``U = J L^-1 J``. On failure the damping is multiplied by ten,
    at most three times (ours); the damping that was used is returned beside the factor.

    Raises:
        NotPositiveDefiniteError: no damping helped.
    """
    size = hessian.shape[0]
    mean = hessian.diagonal().mean()
    identity = torch.eye(size, dtype=hessian.dtype, device=hessian.device)
    for attempt in range(_RETRIES + 1):
        used = damping * 10**attempt
        damped = hessian.clone()
        damped.diagonal().add_(used * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            factor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            if bool(torch.isfinite(factor).all()):
                return factor.contiguous(), used
    raise NotPositiveDefiniteError
