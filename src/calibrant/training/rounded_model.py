"""A whole model whose linears compute with rounded weights and inputs: the student of a training."""

from typing import Protocol

import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from calibrant.modeling.foldable import held
from calibrant.quantization.activation_ranges import InputGrid
from calibrant.quantization.grid_fitting import fit_grid
from calibrant.quantization.grids import Grid, GridSpec, stored_scale
from calibrant.recipes.plan import LearnedLinear, Plan
from calibrant.training.fake_quantization import fake_quantize
from calibrant.training.learned_range import SeenInput, learned_ranges, range_parameters, round_inputs

# Scales and ranges are learned as logarithms, which hardly move at the weights' learning rate (ours).
_RANGE_RATE = 10.0


class Learner(Protocol):
    """A model with trainable parameters.

    ``weights`` are the parameters that sharpness-aware steps perturb; ``groups`` are all trained parameters, each group
    with its factor on the learning rate.
    """

    model: transformers.PreTrainedModel

    @property
    def weights(self) -> list[nn.Parameter]: ...

    @property
    def groups(self) -> list[tuple[list[nn.Parameter], float]]: ...


class RoundedModel:
    """``model`` changed in place: the linears of ``plan`` compute with the values that would be stored.

    Trainable are the unrounded ``weights`` (float32), the scales of their grids, and static input ranges; everything
    else is frozen. A scale is learned as a factor of the fitted scale (learned step sizes; the logarithm is ours); zero
    points stay fixed.

    Args:
        model: in float32.
        plan: has a grid for weights, and optionally one for activations.
        seen: observed inputs of the linears by full name, if activations are static.
    """

    def __init__(
        self, model: transformers.PreTrainedModel, plan: Plan, seen: dict[str, SeenInput] | None = None
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self._weights: dict[str, _RoundedWeight] = {}
        for name in plan.linears:
            linear, spec = model.get_submodule(name), plan.target_of(name).spec
            assert spec is not None
            weight, transposed = linear.get_parameter("weight").data, isinstance(linear, Conv1D)
            rounding = _RoundedWeight(weight, spec, transposed, plan.target.value_dtype)
            parametrize.register_parametrization(linear, "weight", rounding)
            self._weights[name] = rounding
        self._inputs = learned_ranges(plan, seen or {}, {})
        round_inputs(model, plan, self._inputs)
        for parameter in self.weights:
            parameter.requires_grad_(True)

    @property
    def weights(self) -> list[nn.Parameter]:
        """The unrounded weights."""
        return [self._original(name) for name in self._weights]

    @property
    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The weights; then the factors of scales and ranges, with a higher learning rate."""
        factors = [rounding.log_factor for rounding in self._weights.values()]
        return [(self.weights, 1.0), (factors + range_parameters(self._inputs), _RANGE_RATE)]

    def trained(self) -> dict[str, LearnedLinear]:
        """Current weight and grid of every linear, by full name."""
        found = {}
        for name, rounding in self._weights.items():
            weight = self._original(name).detach()
            found[name] = LearnedLinear((weight.T if rounding.transposed else weight).clone(), rounding.grid())
        return found

    def input_grids(self) -> dict[str, InputGrid] | None:
        """Current grids of static inputs by linear name; None if there are none."""
        return {name: learned.grid() for name, learned in self._inputs.items()} or None

    def _original(self, name: str) -> nn.Parameter:
        original: nn.Parameter = self.model.get_parameter(f"{name}.parametrizations.weight.original")
        return original


class _RoundedWeight(nn.Module):
    """Parametrization that rounds a weight on a grid with learned scales."""

    def __init__(self, weight: torch.Tensor, spec: GridSpec, transposed: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.transposed, self._dtype = spec, transposed, dtype
        grid = fit_grid((weight.T if transposed else weight).float(), spec)
        self.log_factor = nn.Parameter(torch.zeros_like(grid.scale))
        self.scale: torch.Tensor
        self.zero_point: torch.Tensor
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero_point", grid.zero_point)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        rows = weight.T if self.transposed else weight
        groups = rows.reshape(len(rows), self.scale.shape[1], -1)
        scale, zero_point = self._learned_scale()[..., None], self.zero_point[..., None]
        rounded = fake_quantize(groups, scale, zero_point, self.spec.qmin, self.spec.qmax).reshape(rows.shape)
        rounded = held(rounded, self._dtype)
        return rounded.T if self.transposed else rounded

    @torch.no_grad()
    def grid(self) -> Grid:
        return Grid(self.spec, self._learned_scale().clone(), self.zero_point.clone())

    def _learned_scale(self) -> torch.Tensor:
        scale = self.scale * self.log_factor.exp()
        return scale + (stored_scale(scale, self.spec) - scale).detach()
