"""What a run will do: a recipe made fit for a model."""

from dataclasses import dataclass, field, replace

import torch

from calibrant.formats.quantized import Layout
from calibrant.methods.solvers.sparsity import Sparsity
from calibrant.quantization.activation_ranges import InputGrid
from calibrant.quantization.grids import Grid, GridSpec
from calibrant.recipes.recipe import Recipe


@dataclass(frozen=True)
class TrainedLinear:
    """A linear after training: its weight ``[out, in]`` (float32), to be rounded on ``grid``."""

    weight: torch.Tensor
    grid: Grid


@dataclass(frozen=True)
class Plan:
    """A recipe made fit for a model.

    ``layout`` is None for models that are stored dense. ``linears`` maps the names of the plain linears to be
    compressed to ``(out, in)``; ``fused`` names parameters that hold many experts. ``notes`` are for the user.
    ``choices`` holds the bits or shares of zeros of linears for which a budget chose others than the scheme's,
    ``scales`` what was learned before the run for the columns behind a norm, by the first linear's full name,
    ``trained`` weights and grids that were learned, ``input_grids`` those of static inputs, by the linear's full name.
    """

    recipe: Recipe
    blocks: list[str]
    linears: dict[str, tuple[int, int]]
    fused: dict[str, tuple[int, ...]]
    spec: GridSpec | None
    sparsity: Sparsity | None
    layout: Layout | None
    notes: list[str]
    choices: dict[str, float] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] | None = None
    trained: dict[str, TrainedLinear] | None = None
    input_grids: dict[str, InputGrid] | None = None

    @property
    def nominal(self) -> float:
        """The scheme's bits, or its share of zeros."""
        return self.spec.bits if self.spec is not None else self.sparsity.share if self.sparsity is not None else 0.0

    @property
    def value_dtype(self) -> torch.dtype:
        """What holds rounded values: float32 where they are computed from codes, else the model's own dtype."""
        return torch.float32 if self.layout is not None or self.spec is None else self.spec.scale_dtype

    def spec_for(self, name: str) -> GridSpec | None:
        """The grid of the linear of that full name."""
        if self.spec is None or name not in self.choices:
            return self.spec
        return replace(self.spec, bits=int(self.choices[name]))

    def sparsity_for(self, name: str) -> Sparsity | None:
        """What is pruned of the linear of that full name."""
        return Sparsity(self.choices[name]) if self.spec is None and name in self.choices else self.sparsity

    def layout_for(self, name: str) -> Layout | None:
        """How the linear of that full name is stored."""
        if self.layout is None or name not in self.choices:
            return self.layout
        return replace(self.layout, bits=int(self.choices[name]))
