"""The upper factor ``U`` of the inverse Hessian, ``H^-1 = U^T U``, by one Cholesky factorization (ours).

Wide layers have Hessians of half a gigabyte and more, so everything after the first copy happens in place.
"""

import torch

_RETRIES = 3
# Triangles up to this size are inverted directly, larger ones by halves, mostly in matrix products.
_DIRECT_SIZE = 192
# Rows of a matrix that are put in order at once.
_ORDERED_ROWS = 1024


class NotPositiveDefiniteError(Exception):
    """The matrix cannot be factored at any damping tried."""


def inverse_factor(
    hessian: torch.Tensor, damping: float, order: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """The factor ``[n, n]`` of ``hessian + damping mean(diag) I`` (``hessian`` ``[n, n]``), and the damping used.

    ``order`` (int64 ``[n]``) puts rows and columns in this order first. A column without input (``H_jj = 0``) gets
    ``H_jj = 1`` before damping, as in GPTQ's released code. With J the reversal permutation, ``J H J = L L^T`` gives
    ``U = J L^-1 J``; arXiv 2210.17323 takes three steps: Cholesky, inverse, Cholesky. If the factorization fails, the
    damping is multiplied by ten, at most three times (ours).

    Raises:
        NotPositiveDefiniteError: the factorization fails at every damping.
    """
    reversal = torch.arange(len(hessian), device=hessian.device).flip(0)
    backwards = order.flip(0) if order is not None else reversal
    diagonal = hessian.diagonal()[backwards]
    diagonal = torch.where(diagonal == 0, 1.0, diagonal)
    mean = diagonal.mean()
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    for attempt in range(_RETRIES + 1):
        used = damping * 10**attempt
        flipped = reordered(hessian, backwards)
        flipped.diagonal().copy_(diagonal + used * mean)
        # The matrix is symmetric, and its transpose has the memory layout that LAPACK overwrites.
        lower = flipped.mT
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed:
            _invert_lower(lower)
            if bool(torch.isfinite(lower.diagonal()).all()):
                return reordered(lower, reversal), used
    raise NotPositiveDefiniteError


def reordered(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows and columns of ``matrix`` ``[n, n]`` in ``order`` (int64 ``[n]``), without a copy beside the result."""
    result = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    for begin in range(0, len(order), _ORDERED_ROWS):
        chosen = order[begin : begin + _ORDERED_ROWS]
        torch.index_select(matrix.index_select(0, chosen), 1, order, out=result[begin : begin + len(chosen)])
    return result


def _invert_lower(lower: torch.Tensor) -> None:
    """Invert a lower triangular matrix in place: ``[[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]``."""
    size = lower.shape[0]
    if size <= _DIRECT_SIZE:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    _invert_lower(lower[:half, :half])
    _invert_lower(lower[half:, half:])
    beside = lower[half:, half:] @ lower[half:, :half]
    lower[half:, :half].addmm_(beside, lower[:half, :half], beta=0, alpha=-1)
