"""The registry: for each method of a recipe, the statistic it needs and the solver it calls."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from calibrant.compression import recipe as recipes
from calibrant.compression.grids import GridSpec, RangeSearch
from calibrant.compression.solvers.adpq import adpq
from calibrant.compression.solvers.gptq import gptq
from calibrant.compression.solvers.hqq import hqq
from calibrant.compression.solvers.magnitude import magnitude
from calibrant.compression.solvers.quantease import quantease, quantease_with_outliers
from calibrant.compression.solvers.result import Solution
from calibrant.compression.solvers.rtn import rtn
from calibrant.compression.solvers.sparsegpt import sparsegpt
from calibrant.compression.solvers.sparsity import Sparsity
from calibrant.compression.solvers.spqr import SpqrSettings, spqr
from calibrant.compression.solvers.wanda import wanda
from calibrant.compression.statistics import ColumnNorm, Hessian, PairedHessian


@dataclass(frozen=True)
class Task:
    """One solve: weights stacked by rows (``segments`` are the row counts), what is known of their input, the target.

    ``hessian`` ``[in, in]`` or ``sum_of_squares`` ``[in]`` is set if the method's statistic provides it.
    """

    weight: torch.Tensor
    segments: tuple[int, ...]
    spec: GridSpec | None
    sparsity: Sparsity | None
    hessian: torch.Tensor | None = None
    sum_of_squares: torch.Tensor | None = None

    @property
    def moments(self) -> torch.Tensor | None:
        """What is known of the inputs' second moments."""
        return self.hessian if self.hessian is not None else self.sum_of_squares


Statistic = type[Hessian] | type[ColumnNorm]
_OF_SEARCH: dict[RangeSearch, Statistic | None] = {"none": None, "mse": None, "importance": ColumnNorm, "clip": Hessian}


@dataclass(frozen=True)
class Entry:
    """A method: ``statistic`` is what it needs itself, None for data-free ones.

    ``data_free`` solves a layer that saw no token.
    """

    statistic: Statistic | None
    solve: Callable[[Any, Task], Solution]
    data_free: Callable[[Task], Solution]


def _spec(task: Task) -> GridSpec:
    assert task.spec is not None
    return task.spec


def _sparsity(task: Task) -> Sparsity:
    assert task.sparsity is not None
    return task.sparsity


def _hessian(task: Task) -> torch.Tensor:
    assert task.hessian is not None
    return task.hessian


def _norms(task: Task) -> torch.Tensor:
    assert task.sum_of_squares is not None
    return task.sum_of_squares


def _round(task: Task) -> Solution:
    return rtn(task.weight, _spec(task), task.moments)


def _drop_smallest(task: Task) -> Solution:
    return magnitude(task.weight, _sparsity(task), task.segments)


def _sparsegpt(method: recipes.SparseGpt, task: Task) -> Solution:
    return sparsegpt(
        task.weight, _hessian(task), _sparsity(task), task.spec, segments=task.segments, damping=method.damping
    )


def _sparsegpt_without_data(task: Task) -> Solution:
    identity = torch.eye(task.weight.shape[1], device=task.weight.device)
    return sparsegpt(task.weight, identity, _sparsity(task), task.spec, segments=task.segments)


def _quantease(method: recipes.QuantEase, task: Task) -> Solution:
    if not method.outliers:
        return quantease(task.weight, _hessian(task), _spec(task), sweeps=method.sweeps)
    return quantease_with_outliers(
        task.weight,
        _hessian(task),
        _spec(task),
        sweeps=method.sweeps,
        share=method.outliers,
        segments=task.segments,
    )


def _spqr(method: recipes.Spqr, task: Task) -> Solution:
    spec, options = _spec(task), method.model_dump(exclude={"name"})
    return spqr(task.weight, _hessian(task), SpqrSettings(spec.bits, spec.group_size, **options))


METHODS: dict[str, Entry] = {
    "rtn": Entry(None, lambda _, task: _round(task), _round),
    "gptq": Entry(
        Hessian,
        lambda m, task: gptq(
            task.weight,
            _hessian(task),
            _spec(task),
            damping=m.damping,
            act_order=m.act_order,
            refine_sweeps=m.refine_sweeps,
        ),
        _round,
    ),
    "quantease": Entry(Hessian, _quantease, _round),
    "spqr": Entry(Hessian, _spqr, _round),
    "hqq": Entry(None, lambda _, task: hqq(task.weight, _spec(task)), _round),
    "adpq": Entry(None, lambda m, task: adpq(task.weight, _spec(task), share=m.share, segments=task.segments), _round),
    "sparsegpt": Entry(Hessian, _sparsegpt, _sparsegpt_without_data),
    "wanda": Entry(ColumnNorm, lambda _, task: wanda(task.weight, _norms(task), _sparsity(task)), _drop_smallest),
    "magnitude": Entry(None, lambda _, task: _drop_smallest(task), _drop_smallest),
}


def statistic_of(recipe: recipes.Recipe) -> Statistic | None:
    """What must be gathered of a layer's inputs: the larger of what the method and the search of ranges need."""
    if recipe.asymmetric:
        return PairedHessian
    weights = recipe.scheme.weights
    needed = (METHODS[recipe.method.name].statistic, _OF_SEARCH[weights.range_search] if weights else None)
    return Hessian if Hessian in needed else ColumnNorm if ColumnNorm in needed else None
