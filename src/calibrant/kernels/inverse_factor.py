"""The upper factor ``U`` of the inverse, ``H^-1 = U^T U``, by one Cholesky factorization (methods.md §5)."""

import torch

_RETRIES = 3
# Triangles up to this size are inverted directly; larger ones by halves, where matrix products do the work.
_DIRECT_SIZE = 192


class NotPositiveDefiniteError(Exception):
    """The matrix could not be factored at any damping that was tried."""


def inverse_factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Factor ``hessian + damping * mean(diag) * I``; both float32 ``[n, n]``.

    With ``J`` the reversal, ``J H J = L L^T`` gives ``U = J L^-1 J``. On failure the damping is multiplied by ten,
    at most three times (ours); the damping that was used is returned beside the factor.

    Raises:
        NotPositiveDefiniteError: no damping helped.
    """
    diagonal = hessian.diagonal().flip(0)
    mean = diagonal.mean()
    flipped = hessian.flip(0, 1)
    for attempt in range(_RETRIES + 1):
        used = damping * 10**attempt
        flipped.diagonal().copy_(diagonal + used * mean)
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not failed:
            factor = _invert_lower(lower).flip(0, 1)
            if bool(torch.isfinite(factor.diagonal()).all()):
                return factor.contiguous(), used
    raise NotPositiveDefiniteError


def _invert_lower(lower: torch.Tensor) -> torch.Tensor:
    """Inverse of a lower triangular matrix: ``[[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]``."""
    size = lower.shape[0]
    if size <= _DIRECT_SIZE:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        solved: torch.Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
        return solved
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _invert_lower(lower[:half, :half])
    inverse[half:, half:] = _invert_lower(lower[half:, half:])
    inverse[half:, :half] = -(inverse[half:, half:] @ lower[half:, :half] @ inverse[:half, :half])
    return inverse
