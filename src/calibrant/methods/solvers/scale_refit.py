"""Scales fitted to frozen codes on a layer's squared output error (arXiv 2602.02126)."""

from dataclasses import replace

import torch

from calibrant.kernels.row_tiles import CHUNK_BYTES
from calibrant.quantization.grids import Grid, decode, stored_scale

# Keeps the systems of a row solvable: this share of the diagonal pulls each scale to where it was (ours).
_RIDGE = 1e-3


def refit_scales(target: torch.Tensor, codes: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> tuple[Grid, int]:
    """``grid`` with the scales that are best for ``codes``, and how many rows they change.

    With numbers ``q_g`` of a row's group g, less its zero point, and that row w of ``target``, the scales s solve
    ``A s = b``, ``A_gh = q_g H_gh q_h``, ``b_g = q_g (H w)_g``; ``target`` float32 and ``codes`` int8 ``[rows, in]``,
    ``hessian`` H ``[in, in]``. Scales are rounded to storage, and a row keeps the old ones where the error is not less
    (ours). Zero points stay.
    """
    rows, columns = codes.shape
    groups = grid.scale.shape[1]
    scale, changed = grid.scale.clone(), 0
    step = max(1, CHUNK_BYTES // (4 * max(columns, groups * groups)))
    unit = replace(grid, scale=torch.ones_like(grid.scale))
    for begin in range(0, rows, step):
        own = slice(begin, begin + step)
        numbers = decode(codes[own], unit.rows(own))
        products, wanted = _system(numbers, target[own] @ hessian, hessian, groups)
        before = grid.scale[own]
        diagonal = products.diagonal(dim1=1, dim2=2)
        ridge = _RIDGE * diagonal + torch.where(diagonal > 0, 0.0, 1.0)  # a group of zeros keeps its scale
        factor, failed = torch.linalg.cholesky_ex(products + torch.diag_embed(ridge))
        solved = torch.cholesky_solve((wanted + ridge * before)[..., None], factor)[..., 0]
        fitted = torch.where(solved.isfinite() & (solved * before > 0), stored_scale(solved, grid.spec), before)
        better = (_error(fitted, products, wanted) < _error(before, products, wanted)) & (failed == 0)
        scale[own] = torch.where(better[:, None], fitted, before)
        changed += int(better.sum())
    return replace(grid, scale=scale), changed


def _system(
    numbers: torch.Tensor, outputs: torch.Tensor, hessian: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[rows, groups, groups]`` and b ``[rows, groups]``; ``outputs`` are the target's times H."""
    rows, columns = numbers.shape
    width = columns // groups
    products = numbers.new_empty(rows, groups, groups)
    for group in range(groups):
        begin, end = group * width, (group + 1) * width
        here = numbers[:, begin:end] @ hessian[begin:end, begin:]
        found = (here * numbers[:, begin:]).view(rows, groups - group, width).sum(-1)
        products[:, group, group:] = found
        products[:, group:, group] = found
    return products, (numbers * outputs).view(rows, groups, width).sum(-1)


def _error(scale: torch.Tensor, products: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The rows' errors less what is equal for all scales, float64 ``[rows]``."""
    values = scale.double()
    quadratic = torch.einsum("rg,rgh,rh->r", values, products.double(), values)
    return quadratic - 2 * (values * wanted.double()).sum(-1)
