"""Solving one layer in several ranks, each of which solves some of its rows."""

from dataclasses import replace
from typing import Any

import torch

from calibrant.kernels.row_tiles import LANES
from calibrant.methods.method import LayerProblem, LayerSolver
from calibrant.methods.solvers.result import Solution
from calibrant.methods.training import Trainer
from calibrant.quantization.grids import NV_SCALE, Grid, GridSpec
from calibrant.ranks import Ranks

_BY_ROW = ("weight", "codes", "kept", "errors", "rounded", "outliers")


def solve(entry: LayerSolver | Trainer, options: Any, problem: LayerProblem, ranks: Ranks) -> Solution:
    """The solution of ``problem``: shared out where rows are independent of each other, else found by every rank."""
    count = len(problem.weight)
    by_rows = isinstance(entry, LayerSolver) and entry.by_rows(options) and _rows_alone(problem.spec)
    if ranks.alone or not by_rows or count < ranks.size * LANES:
        return entry.solve(options, problem)
    own = problem.weight[ranks.part(count, LANES)]
    part = entry.solve(options, replace(problem, weight=own, segments=(len(own),)))

    def joined(rows: torch.Tensor | None) -> torch.Tensor | None:
        return None if rows is None else ranks.joined_rows(rows.contiguous(), count, LANES)

    values: dict[str, Any] = {name: joined(vars(part)[name]) for name in _BY_ROW}
    if part.grid is not None:
        scale, zero_point = joined(part.grid.scale), joined(part.grid.zero_point)
        assert scale is not None
        assert zero_point is not None
        values["grid"] = Grid(part.grid.spec, scale, zero_point)
    return Solution(**values, record=part.record)


def _rows_alone(spec: GridSpec | None) -> bool:
    """Whether every row of a grid has scales of its own."""
    return spec is None or (spec.scale_rows == 1 and spec.blocks is None and spec.scale_dtype is not NV_SCALE)
