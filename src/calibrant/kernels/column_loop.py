"""The column loop of GPTQ and SparseGPT: choose a value for each column, push its error into the later ones.

``solve_columns`` runs blocks of columns through a kernel and applies each block's errors to the rest by one matrix
product ("lazy batch"). The kernel exists in Numba, parallel over rows, and as a plain PyTorch twin; both do the same
operations in the same order and give the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
import torch

from calibrant.kernels.masks import keep_largest

BLOCK_SIZE = 128


@dataclass(frozen=True)
class ColumnProblem:
    """What to solve, columns already in solving order.

    ``weight`` ``[rows, n]`` float32; ``factor`` ``[n, n]`` the upper factor U. Quantization: ``scale`` and ``zero``
    ``[rows, groups]`` and ``group`` ``[n]`` (int64), with codes in ``lowest ... highest``, or all None to keep values.
    Pruning: ``pruned_of = (k, m)`` masks k of every m consecutive columns; ``sparsity`` masks a share of each block
    of columns over the rows of each of ``segments`` (lengths of consecutive runs of rows); at most one of them.
    """

    weight: torch.Tensor
    factor: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    group: torch.Tensor | None = None
    lowest: int = 0
    highest: int = 0
    pruned_of: tuple[int, int] | None = None
    sparsity: float = 0.0
    segments: tuple[int, ...] = ()


@dataclass(frozen=True)
class ColumnSolution:
    """``weight`` float32 and ``kept`` bool ``[rows, n]``, ``codes`` int8 (zeros without quantization), ``loss`` ``[rows]``.

    ``loss`` is ``sum_j e_j^2`` of a row: its part of ``tr((W - Q) H (W - Q)^T)`` with the damped H (methods.md §7).
    """

    weight: torch.Tensor
    codes: torch.Tensor
    kept: torch.Tensor
    loss: torch.Tensor


def solve_columns(problem: ColumnProblem, block_size: int = BLOCK_SIZE, compiled: bool = True) -> ColumnSolution:
    """Solve all columns; ``compiled=False`` or tensors on a GPU use the PyTorch twin."""
    work = problem.weight.clone()
    rows, columns = work.shape
    solved = torch.empty_like(work)
    codes = torch.zeros(rows, columns, dtype=torch.int8, device=work.device)
    kept = torch.ones(rows, columns, dtype=torch.bool, device=work.device)
    loss = torch.zeros(rows, dtype=torch.float32, device=work.device)
    run = _numba_block if compiled and work.device.type == "cpu" else _torch_block
    for begin in range(0, columns, block_size):
        end = min(begin + block_size, columns)
        block = _block(problem, work, begin, end)
        errors = run(block, problem)
        solved[:, begin:end], codes[:, begin:end], kept[:, begin:end] = block.work, block.codes, block.kept
        loss += errors.square().sum(1)
        if end < columns:
            work[:, end:].addmm_(errors, problem.factor[begin:end, end:], alpha=-1)
    return ColumnSolution(solved, codes, kept, loss)


@dataclass(frozen=True)
class _Block:
    """One block of columns, changed in place by a kernel: ``work`` ends as the chosen values."""

    work: torch.Tensor
    factor: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    codes: torch.Tensor
    kept: torch.Tensor


def _block(problem: ColumnProblem, work: torch.Tensor, begin: int, end: int) -> _Block:
    columns = work[:, begin:end].contiguous()
    factor = problem.factor[begin:end, begin:end].contiguous()
    if problem.scale is not None and problem.zero is not None and problem.group is not None:
        group = problem.group[begin:end]
        scale, zero = problem.scale[:, group].contiguous(), problem.zero[:, group].contiguous()
    else:
        scale = zero = columns.new_zeros(0, 0)
    kept = torch.ones(columns.shape, dtype=torch.bool, device=columns.device)
    if problem.sparsity > 0:
        scores = (columns / factor.diagonal()).square()
        runs = scores.split(list(problem.segments or (len(scores),)))
        kept = torch.cat([keep_largest(run, problem.sparsity) for run in runs])
    return _Block(columns, factor, scale, zero, torch.zeros_like(columns, dtype=torch.int8), kept)


def _torch_block(block: _Block, problem: ColumnProblem) -> torch.Tensor:
    """The plain twin: returns the errors ``[rows, columns]``."""
    work, factor = block.work, block.factor
    errors = torch.empty_like(work)
    diagonal = factor.diagonal()
    for column in range(work.shape[1]):
        if problem.pruned_of is not None and column % problem.pruned_of[1] == 0:
            pruned, of = problem.pruned_of
            scores = (work[:, column : column + of] / diagonal[column : column + of]).square()
            smallest = torch.argsort(scores, dim=1, stable=True)[:, :pruned]
            block.kept[:, column : column + of].scatter_(1, smallest, False)
        value = torch.where(block.kept[:, column], work[:, column], 0.0)
        if problem.scale is not None:
            scale, zero = block.scale[:, column], block.zero[:, column]
            code = torch.round(torch.clamp(value / scale + zero, problem.lowest, problem.highest))
            code = torch.where(block.kept[:, column], code, zero)
            block.codes[:, column] = code.to(torch.int8)
            value = (code - zero) * scale
        error = (work[:, column] - value) / diagonal[column]
        work[:, column] = value
        errors[:, column] = error
        work[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    return errors


def _numba_block(block: _Block, problem: ColumnProblem) -> torch.Tensor:
    errors = torch.empty_like(block.work)
    pruned, of = problem.pruned_of or (0, 0)
    _compiled_block(
        block.work.numpy(),
        block.factor.numpy(),
        block.scale.numpy(),
        block.zero.numpy(),
        block.codes.numpy(),
        block.kept.numpy(),
        errors.numpy(),
        np.float32(problem.lowest),
        np.float32(problem.highest),
        pruned,
        of,
    )
    return errors


def _rows(
    work: np.ndarray,
    factor: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    codes: np.ndarray,
    kept: np.ndarray,
    errors: np.ndarray,
    lowest: np.float32,
    highest: np.float32,
    pruned: int,
    of: int,
) -> None:
    rows, columns = work.shape
    quantize = scale.shape[0] > 0
    for row in numba.prange(rows):
        for column in range(columns):
            if of > 0 and column % of == 0:
                for _ in range(pruned):
                    best = -1
                    best_score = np.float32(0)
                    for place in range(column, column + of):
                        if kept[row, place]:
                            ratio = work[row, place] / factor[place, place]
                            score = ratio * ratio
                            if best < 0 or score < best_score:
                                best, best_score = place, score
                    kept[row, best] = False
            value = work[row, column] if kept[row, column] else np.float32(0)
            if quantize:
                step, shift = scale[row, column], zero[row, column]
                code = shift
                if kept[row, column]:
                    code = np.rint(min(max(value / step + shift, lowest), highest))
                codes[row, column] = np.int8(code)
                value = (code - shift) * step
            error = (work[row, column] - value) / factor[column, column]
            work[row, column] = value
            errors[row, column] = error
            for later in range(column + 1, columns):
                work[row, later] -= error * factor[column, later]


_compiled_block: Callable[..., None] = numba.njit(parallel=True, cache=True)(_rows)
