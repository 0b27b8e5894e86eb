"""The upper factor ``U`` of the inverse Hessian, ``H^-1 = U^T U``, by one Cholesky factorization (ours)."""

import torch

_RETRIES = 3
# Triangles up to this size are inverted directly, larger ones by halves, mostly in matrix products.
_DIRECT_SIZE = 192


class NotPositiveDefiniteError(Exception):
    """The matrix cannot be factored at any damping tried."""


def inverse_factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """The factor ``[n, n]`` of ``hessian + damping mean(diag) I`` (``hessian`` ``[n, n]``), and the damping used.

    With J the reversal permutation, ``J H J = L L^T`` gives ``U = J L^-1 J``; arXiv 2210.17323 takes three steps:
    Cholesky, inverse, Cholesky. If the factorization fails, the damping is multiplied by ten, at most three times
    (ours).

    Raises:
        NotPositiveDefiniteError: the factorization fails at every damping.
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
