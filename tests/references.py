"""Short float64 references for solvers and kernels."""

import torch


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The three-step factor of the papers' code: Cholesky, inverse, Cholesky again (upper)."""
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(
        len(hessian), dtype=torch.float64
    )
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def column_loop(
    weight: torch.Tensor,
    factor: torch.Tensor,
    quantize,
    pruned_of: tuple[int, int] | None = None,
    block_masks=None,
) -> torch.Tensor:
    """The column loop in float64; ``quantize(column index, values)`` rounds a column.

    ``pruned_of = (k, m)`` prunes k of every m columns; ``block_masks = (width, share)`` prunes a share of each block.
    """
    work = weight.double().clone()
    solved = torch.zeros_like(work)
    kept = torch.ones_like(work, dtype=torch.bool)
    for j in range(work.shape[1]):
        if block_masks is not None and j % block_masks[0] == 0:
            block = slice(j, min(j + block_masks[0], work.shape[1]))
            scores = (work[:, block] / factor.diagonal()[block]) ** 2
            count = int(block_masks[1] * scores.numel() + 1e-9)
            flat = torch.ones(scores.numel(), dtype=torch.bool)
            flat[scores.flatten().argsort(stable=True)[:count]] = False
            kept[:, block] = flat.view(scores.shape)
        if pruned_of is not None and j % pruned_of[1] == 0:
            block = slice(j, j + pruned_of[1])
            scores = (work[:, block] / factor.diagonal()[block]) ** 2
            kept[:, block].scatter_(1, torch.argsort(scores, dim=1, stable=True)[:, : pruned_of[0]], False)
        value = torch.where(kept[:, j], work[:, j], 0.0)
        solved[:, j] = torch.where(kept[:, j], quantize(j, value), 0.0)
        error = (work[:, j] - solved[:, j]) / factor[j, j]
        work[:, j:] -= error[:, None] * factor[j, j:]
    return solved


def problem(rows: int, columns: int, seed: int = 0, tokens: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight ``[rows, columns]`` and the Hessian ``[columns, columns]`` of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) * 0.3 + torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    hessian = inputs.T @ inputs
    return weight, (hessian + hessian.T) / 2
