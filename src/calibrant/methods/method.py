"""What a method is to the engine: its options in a recipe, what it must know of a layer's input, how it solves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from calibrant.methods.solvers.result import Solution
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.quantization.grids import GridSpec
from calibrant.quantization.statistics import Hessian, HessianDiagonal
from calibrant.strict import Strict

Statistic = type[Hessian] | type[HessianDiagonal]


class MethodOptions(Strict):
    """A method's options in a recipe; each has ``name`` as a literal, by which it is found."""

    name: str


@dataclass(frozen=True)
class LayerProblem:
    """One solve: weights stacked by rows (``segments`` are the row counts), what is known of their input, the target.

    A solver is only handed tasks that have what it needs: ``spec`` if it quantizes, ``sparsity`` if it prunes, and of
    ``hessian`` ``[in, in]`` and ``hessian_diagonal`` ``[in]`` (its diagonal) what its statistic gives.
    """

    weight: torch.Tensor
    segments: tuple[int, ...]
    spec: GridSpec | None
    sparsity: Sparsity | None
    hessian: torch.Tensor | None = None
    hessian_diagonal: torch.Tensor | None = None

    @property
    def known_hessian(self) -> torch.Tensor | None:
        """What is known of the inputs' second moments."""
        return self.hessian if self.hessian is not None else self.hessian_diagonal

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
    def full_hessian(self) -> torch.Tensor:
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

    ``solve`` gets the options and a problem; None for what does not work layer by layer (``changes_shape``).
    ``without_data`` gets a problem whose layer saw no token; methods have one that look at inputs, in their solve or in a
    range search. ``symmetric``: which weights the method is for, where it fits its ranges itself; None for any grids.
    ``stored_dense``: with which options no quantized format holds the result. ``passes``: about how often a solve goes
    over all pairs of columns, for the estimate of time.
    """

    options: type[MethodOptions]
    solve: Callable[[Any, LayerProblem], Solution] | None
    without_data: Callable[[LayerProblem], Solution] | None = None
    statistic: Statistic | None = None
    quantizes: bool = True
    prunes: bool = False
    symmetric: bool | None = None
    stored_dense: Callable[[Any], bool] = _never
    passes: Callable[[Any], float] = _nothing

    @property
    def changes_shape(self) -> bool:
        """Whether it changes the shapes of the model."""
        return self.solve is None

    @property
    def name(self) -> str:
        """As recipes spell it."""
        return str(self.options.model_fields["name"].default)
