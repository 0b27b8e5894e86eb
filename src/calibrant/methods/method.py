"""What the engine knows of a method: its options in a recipe, the statistic it needs, how it solves a layer."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from calibrant.methods.solvers.result import Solution
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.quantization.activation_ranges import RangeRule
from calibrant.quantization.grids import GridSpec, RangeSearch
from calibrant.quantization.statistics import Hessian, HessianDiagonal
from calibrant.strict import Strict

Statistic = type[Hessian] | type[HessianDiagonal]


class MethodOptions(Strict):
    """A method's options in a recipe; each subclass narrows ``name`` to the literal that recipes use."""

    name: str

    def refusal(self, scheme: "Scheme") -> str | None:
        """A sentence that says why the method cannot reach ``scheme`` with these options; None if it can."""
        del scheme
        return None


@dataclass(frozen=True)
class LayerProblem:
    """One layer to compress, or several that share an input, with what is known of that input and the target.

    ``weight`` float32 ``[rows, in]`` stacks matrices of ``segments`` rows each. ``spec`` is set for methods that
    quantize, ``sparsity`` for methods that prune. ``hessian`` float32 ``[in, in]`` and ``hessian_diagonal`` float32
    ``[in]`` are set if the method's statistic gives them.
    """

    weight: torch.Tensor
    segments: tuple[int, ...]
    spec: GridSpec | None
    sparsity: Sparsity | None
    hessian: torch.Tensor | None = None
    hessian_diagonal: torch.Tensor | None = None

    @property
    def hessian_or_diagonal(self) -> torch.Tensor | None:
        """The full Hessian if known, else its diagonal if known."""
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
        """``hessian``, for methods whose statistic is ``Hessian``."""
        assert self.hessian is not None
        return self.hessian


class SchemeWeights(Protocol):
    """What methods restrict of a scheme's weights."""

    @property
    def symmetric(self) -> bool: ...

    @property
    def type(self) -> str: ...

    @property
    def range_search(self) -> RangeSearch: ...

    @property
    def signed_scales(self) -> bool: ...


class SchemeActivations(Protocol):
    """What methods restrict of a scheme's activations."""

    @property
    def type(self) -> str: ...

    @property
    def dynamic(self) -> bool: ...

    @property
    def range(self) -> RangeRule: ...


class Scheme(Protocol):
    """What methods restrict of a recipe's scheme; ``sparsity`` is a share ("0.5") or a pattern ("2:4")."""

    @property
    def weights(self) -> SchemeWeights | None: ...

    @property
    def activations(self) -> SchemeActivations | None: ...

    @property
    def sparsity(self) -> str | None: ...


@dataclass(frozen=True)
class MethodBase(ABC):
    """What methods of every kind declare."""

    changes_shape: ClassVar[bool]
    options: type[MethodOptions]

    @property
    def name(self) -> str:
        """The method's name in recipes."""
        return str(self.options.model_fields["name"].default)

    @abstractmethod
    def refusal(self, scheme: Scheme, *, by_layer: bool) -> str | None:
        """A sentence that says why the method cannot reach ``scheme``; None if it can.

        ``by_layer``: the recipe treats layers differently, by ``ignore`` or by a budget.
        """


def _never(_: Any) -> bool:
    return False


def _no_passes(_: Any) -> float:
    return 0.0


@dataclass(frozen=True)
class LayerSolver(MethodBase):
    """A method that compresses layer by layer.

    ``solve`` maps the options and a problem to a solution. ``without_data`` solves layers that saw no token; every
    method has one that uses inputs, in ``solve`` or in a range search. ``symmetric``: the only kind of grid that a
    method which fits its own ranges supports; None for methods that take any grid. ``stored_dense``: whether, with
    these options, no quantized format can represent the result. ``passes``: how many passes over all pairs of columns a
    solve costs, for the time estimate. ``floats``: whether it solves for other types of
    weights than integers. ``by_rows``: whether, with these options, every row is solved on its own.
    """

    changes_shape = False
    solve: Callable[[Any, LayerProblem], Solution]
    without_data: Callable[[LayerProblem], Solution] | None = None
    statistic: Statistic | None = None
    quantizes: bool = True
    prunes: bool = False
    symmetric: bool | None = None
    floats: bool = False
    stored_dense: Callable[[Any], bool] = _never
    passes: Callable[[Any], float] = _no_passes
    by_rows: Callable[[Any], bool] = _never

    def refusal(self, scheme: Scheme, *, by_layer: bool) -> str | None:
        weights = scheme.weights
        if not self.prunes and (weights is None or scheme.sparsity is not None):
            return f"{self.name} quantizes: the scheme needs weights and no sparsity"
        if self.prunes and scheme.sparsity is None:
            return _needs_sparsity(self.name)
        if weights is None:
            return None
        if not self.quantizes:
            return _cannot_quantize(self.name)
        if weights.type != "int" and not self.floats:
            return (
                f"{self.name} solves for integers: take rtn, gptq, quantease or sparsegpt for weights of {weights.type}"
            )
        if self.symmetric is not None and weights.symmetric != self.symmetric:
            return f"{self.name} needs weights with symmetric: {str(self.symmetric).lower()}"
        if self.symmetric is not None and weights.range_search != "none":
            return f"{self.name} fits its ranges itself: leave range_search out"
        return None


@dataclass(frozen=True)
class StructuredPruner(MethodBase):
    """A method that removes whole parts of blocks and so changes the model's shapes (engine/two_stage_pruning.py)."""

    changes_shape = True
    statistic: Statistic

    def stored_dense(self, _: Any) -> bool:
        """False: the result has no quantized weights."""
        return False

    def passes(self, _: Any) -> float:
        """0: no layer is solved."""
        return 0.0

    def refusal(self, scheme: Scheme, *, by_layer: bool) -> str | None:
        if scheme.sparsity is None:
            return _needs_sparsity(self.name)
        if scheme.weights is not None:
            return _cannot_quantize(self.name)
        if ":" in scheme.sparsity or by_layer:
            return f"{self.name} prunes whole blocks to a share: it knows no pattern n:m, no ignore and no budget"
        return None


def _needs_sparsity(name: str) -> str:
    return f"{name} prunes: the scheme needs a sparsity"


def _cannot_quantize(name: str) -> str:
    return f"{name} cannot quantize: take sparsegpt, or leave weights out"
