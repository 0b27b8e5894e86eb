"""What a run will do: a recipe fitted to a model."""

from dataclasses import dataclass, field, replace

import torch

from calibrant.formats.quantized import Layout
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.quantization.activation_ranges import InputGrid
from calibrant.quantization.grids import Grid, GridSpec
from calibrant.recipes.recipe import Recipe


@dataclass(frozen=True)
class Target:
    """What becomes of a layer: its grid, its sparsity, and how it is stored (None: dense)."""

    spec: GridSpec | None
    sparsity: Sparsity | None
    layout: Layout | None

    @property
    def nominal(self) -> float:
        """The bits, or the share of zeros."""
        return self.spec.bits if self.spec is not None else self.sparsity.share if self.sparsity is not None else 0.0

    @property
    def value_dtype(self) -> torch.dtype:
        """Dtype of rounded values: float32 where loaders compute them from codes, else the model's own dtype."""
        return torch.float32 if self.layout is not None or self.spec is None else self.spec.scale_dtype

    def at(self, choice: float) -> "Target":
        """The same with other bits, or another share of zeros."""
        if self.spec is None:
            return replace(self, sparsity=Sparsity(choice))
        layout = replace(self.layout, bits=int(choice)) if self.layout is not None else None
        return replace(self, spec=replace(self.spec, bits=int(choice)), layout=layout)


@dataclass(frozen=True)
class LayerPlan:
    """One layer that is compressed: the shape of its weight, ``(out, in)`` or for fused experts three sizes."""

    shape: tuple[int, ...]
    target: Target


@dataclass(frozen=True)
class LearnedLinear:
    """A linear after training: its weight ``[out, in]`` (float32), to be rounded on ``grid``."""

    weight: torch.Tensor
    grid: Grid


@dataclass(frozen=True)
class Learned:
    """What a training found; None for what it did not learn.

    ``scales`` are those of the columns behind a norm, by the first linear's full name; ``weights`` and the
    ``input_grids`` of static activations stand under the linear's full name.
    """

    scales: dict[str, torch.Tensor] | None = None
    weights: dict[str, LearnedLinear] | None = None
    input_grids: dict[str, InputGrid] | None = None


@dataclass(frozen=True)
class Plan:
    """A recipe fitted to a model.

    ``target`` is the scheme's; ``layers`` holds every layer that is compressed by its full name (fused experts by their
    parameter's), each with a target of its own where a budget chose one. ``notes`` are sentences for the user.
    """

    recipe: Recipe
    blocks: list[str]
    target: Target
    layers: dict[str, LayerPlan]
    notes: list[str]
    learned: Learned = field(default_factory=Learned)

    @property
    def linears(self) -> dict[str, tuple[int, ...]]:
        """Shapes ``(out, in)`` of the plain linears."""
        return {name: layer.shape for name, layer in self.layers.items() if len(layer.shape) == 2}

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that hold many experts each."""
        return {name: layer.shape for name, layer in self.layers.items() if len(layer.shape) > 2}

    def target_of(self, name: str) -> Target:
        """What becomes of the layer with that full name; single experts get the scheme's target."""
        return self.layers[name].target if name in self.layers else self.target

    def with_choices(self, choices: dict[str, float]) -> "Plan":
        """The plan with a budget's bits or shares of zeros, by full name."""
        layers = {
            name: replace(layer, target=layer.target.at(choices[name])) if name in choices else layer
            for name, layer in self.layers.items()
        }
        return replace(self, layers=layers)
