"""A plan: a recipe fitted to a model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from calibrant.formats.gguf_types import GgufName, fitting_type
from calibrant.formats.quantized import Layout
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.quantization.activation_ranges import InputGrid
from calibrant.quantization.grids import Grid, GridSpec
from calibrant.recipes.gguf_spec import gguf_spec
from calibrant.recipes.parts import Choice
from calibrant.recipes.recipe import Recipe


@dataclass(frozen=True)
class Target:
    """Target of a layer: its grid, its sparsity, and its storage layout (None: dense)."""

    spec: GridSpec | None
    sparsity: Sparsity | None
    layout: Layout | None

    @property
    def nominal(self) -> float:
        """Bits if there is a grid, otherwise the share of zeros."""
        return self.spec.bits if self.spec is not None else self.sparsity.share if self.sparsity is not None else 0.0

    @property
    def value_dtype(self) -> torch.dtype:
        """Dtype of rounded values: float32 if loaders compute them from codes, otherwise the model's dtype."""
        return torch.float32 if self.layout is not None or self.spec is None else self.spec.scale_dtype

    def at(self, choice: Choice, columns: int) -> "Target":
        """The same target with ``choice`` as its bits, its type or its share of zeros, for ``columns`` inputs."""
        if isinstance(choice, str):
            return self._of_type(fitting_type(choice, columns))
        if self.spec is None:
            return replace(self, sparsity=Sparsity(choice))
        layout = replace(self.layout, bits=int(choice)) if self.layout is not None else None
        return replace(self, spec=replace(self.spec, bits=int(choice)), layout=layout)

    def _of_type(self, kind: GgufName) -> "Target":
        """The same target with another of llama.cpp's types."""
        assert self.spec is not None
        assert self.layout is not None
        spec = gguf_spec(kind, self.spec.range_search)
        layout = replace(self.layout, bits=spec.bits, symmetric=spec.symmetric, group_size=spec.group_size, type=kind)
        return replace(self, spec=spec, layout=layout)


@dataclass(frozen=True)
class LayerPlan:
    """One layer to compress; ``shape`` of its weight is ``(out, in)``, or three sizes for fused experts."""

    shape: tuple[int, ...]
    target: Target


@dataclass(frozen=True)
class HeadPlan:
    """The output matrix, the linear ``name``, to compress beside the blocks."""

    name: str
    layer: LayerPlan


@dataclass(frozen=True)
class LearnedLinear:
    """A trained linear: its unrounded weight ``[out, in]`` (float32) and the ``grid`` to round it on."""

    weight: torch.Tensor
    grid: Grid


@dataclass(frozen=True)
class Learned:
    """Results of a training; None for what was not learned.

    ``scales`` multiply the columns of the linears that read a norm, by the full name of the first of these linears;
    ``weights`` and ``input_grids`` (static activations) are by the linear's full name.
    """

    scales: dict[str, torch.Tensor] | None = None
    weights: dict[str, LearnedLinear] | None = None
    input_grids: dict[str, InputGrid] | None = None


@dataclass(frozen=True)
class Plan:
    """A recipe fitted to a model.

    ``target`` is the scheme's target; ``layers`` contains every layer to compress by full name (fused experts by their
    parameter's name), with the scheme's target or the one that a budget chose. ``left`` has the sizes of the other
    weights of the blocks, by parameter name. ``notes`` are sentences for the user. ``left_alone`` are linears that stay
    as they are without being ignored, such as routers of experts. ``head`` is None where the output matrix stays as it
    is.
    """

    recipe: Recipe
    blocks: list[str]
    target: Target
    layers: dict[str, LayerPlan]
    notes: list[str]
    left: dict[str, int] = field(default_factory=dict)
    learned: Learned = field(default_factory=Learned)
    left_alone: frozenset[str] = frozenset()
    head: HeadPlan | None = None

    def leaves(self, name: str) -> bool:
        """Whether the layer or parameter with full name ``name`` stays as it is."""
        return name in self.left_alone or self.recipe.ignores(name)

    @property
    def share(self) -> float:
        """Share of the blocks' weights that the plan compresses, from 0 to 1."""
        return self.share_of(sum(math.prod(layer.shape) for layer in self.layers.values()))

    def share_of(self, elements: int) -> float:
        """Share of the blocks' weights that ``elements`` weights are, from 0 to 1."""
        whole = sum(math.prod(layer.shape) for layer in self.layers.values()) + sum(self.left.values())
        return round(elements / whole, 6)

    @property
    def linears(self) -> dict[str, tuple[int, ...]]:
        """Shapes ``(out, in)`` of the plain linears."""
        return {name: layer.shape for name, layer in self.layers.items() if len(layer.shape) == 2}

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the fused experts' parameters."""
        return {name: layer.shape for name, layer in self.layers.items() if len(layer.shape) > 2}

    @property
    def fused_layout(self) -> Layout | None:
        """How single experts of fused parameters are stored; None if the parameters are stored dense."""
        return self.target.layout

    def target_of(self, name: str) -> Target:
        """Target of the layer with full name ``name``; single experts of a fused parameter get the scheme's target."""
        return self.layers[name].target if name in self.layers else self.target

    def with_choices(self, choices: Mapping[str, Choice]) -> "Plan":
        """The plan with ``choices`` by full layer name: bits, types or shares of zeros, as a budget has them."""
        layers = {
            name: replace(layer, target=layer.target.at(choices[name], layer.shape[-1])) if name in choices else layer
            for name, layer in self.layers.items()
        }
        return replace(self, layers=layers)
