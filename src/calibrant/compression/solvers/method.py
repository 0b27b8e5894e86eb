"""What a method is to the engine: its options in a recipe, what it must know of a layer's input, how it solves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from calibrant.compression.grids import GridSpec
from calibrant.compression.solvers.result import Solution
from calibrant.compression.solvers.sparsity import Sparsity
from calibrant.compression.statistics import ColumnNorm, Hessian
from calibrant.compression.strict import Strict

Statistic = type[Hessian] | type[ColumnNorm]


class MethodOptions(Strict):
    """A method's options in a recipe; each has ``name`` as a literal, by which it is found."""

    name: str


@dataclass(frozen=True)
class Task:
    """One solve: weights stacked by rows (``segments`` are the row counts), what is known of their input, the target.

    A solver is only handed tasks that have what it needs: ``spec`` if it quantizes, ``sparsity`` if it prunes, and of
    ``hessian`` ``[in, in]`` and ``sum_of_squares`` ``[in]`` (its diagonal) what its statistic gives.
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

    @property
    def grid_spec(self) -> GridSpec:
        """``spec``, for methods that quantize."""
        assert self.spec is not None
        return self.spec

    @property
    def pattern(self) -> Sparsity:
        """``sparsity``, for methods that prune."""
        assert self.sparsity is not None
        return self.sparsity

    @property
    def full_moments(self) -> torch.Tensor:
        """``hessian``, for methods whose statistic it is."""
        assert self.hessian is not None
        return self.hessian


def _never(_: Any) -> bool:
    return False


def _nothing(_: Any) -> float:
    return 0.0


@dataclass(frozen=True)
class Method:
    """A registry entry.

    ``solve`` gets the options and a task; None for what does not work layer by layer (``structured``).
    ``without_data`` gets a task whose layer saw no token; methods have one that look at inputs, in their solve or in a
    range search. ``symmetric``: which weights the method is for, where it fits its ranges itself; None for any grids.
    ``stored_dense``: with which options no quantized format holds the result. ``passes``: about how often a solve goes
    over all pairs of columns, for the estimate of time.
    """

    options: type[MethodOptions]
    solve: Callable[[Any, Task], Solution] | None
    without_data: Callable[[Task], Solution] | None = None
    statistic: Statistic | None = None
    quantizes: bool = True
    prunes: bool = False
    symmetric: bool | None = None
    stored_dense: Callable[[Any], bool] = _never
    passes: Callable[[Any], float] = _nothing

    @property
    def structured(self) -> bool:
        """Whether it changes the shapes of the model."""
        return self.solve is None

    @property
    def name(self) -> str:
        """As recipes spell it."""
        return str(self.options.model_fields["name"].default)
