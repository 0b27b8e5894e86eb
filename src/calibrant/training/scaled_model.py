"""A whole model with channel scales between norms and rounded linears, for Quadapter's second phase.

The model computes with the values that will be stored: gains, and scaled columns before rounding, are cast to their
stored dtype.
"""

from dataclasses import dataclass

import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from calibrant.modeling.foldable import FoldablePair, fold_gain, held
from calibrant.quantization.activation_ranges import InputGrid
from calibrant.quantization.grids import GridSpec
from calibrant.recipes.plan import Plan
from calibrant.training.fake_quantization import fake_quantize_weight
from calibrant.training.learned_range import SeenInput, learned_ranges, range_parameters, round_inputs


@dataclass(frozen=True)
class PlacedPair:
    """A foldable pair of the block ``prefix``; ``stored`` maps parameter names within the block to stored dtypes."""

    prefix: str
    pair: FoldablePair
    stored: dict[str, torch.dtype]

    @property
    def name(self) -> str:
        """Full name of the first linear that reads the norm."""
        return f"{self.prefix}.{self.pair.group.module}"


class ScaledModel:
    """``model`` changed in place: norms multiplied by ``alpha``; columns of their linears divided by it and rounded.

    Trainable are the logarithms of ``alpha`` and static input ranges; all weights are frozen.

    Args:
        model: in float32.
        plan: contains the initial scales (``1 / alpha``).
        pairs: the norms and linears that the scales belong to.
        seen: observed inputs of the unscaled linears by full name, if activations are static.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        plan: Plan,
        pairs: list[PlacedPair],
        seen: dict[str, SeenInput] | None,
    ) -> None:
        assert plan.learned.scales is not None
        self.model = model.requires_grad_(False).eval()
        self._logs = {
            placed.name: nn.Parameter(-plan.learned.scales[placed.name].detach().clone().float().log())
            for placed in pairs
        }
        fold_of: dict[str, _Fold] = {}
        dtype_of: dict[str, torch.dtype] = {}
        for placed in pairs:
            producer, linears = placed.pair.producer, placed.pair.group.linears
            norm = model.get_submodule(f"{placed.prefix}.{producer.norm}")
            dtype = placed.stored[f"{producer.norm}.weight"]
            moved = _Fold(self._logs[placed.name], norm.get_parameter("weight").data, producer.offset, dtype)
            parametrize.register_parametrization(norm, "weight", _ScaledGain(moved))
            if producer.bias is not None:
                parametrize.register_parametrization(norm, "bias", _ScaledBias(moved, placed.stored[producer.bias]))
            fold_of |= {f"{placed.prefix}.{linear.name}": moved for linear in linears}
            dtype_of |= {f"{placed.prefix}.{linear.name}": placed.stored[linear.parameter] for linear in linears}
        # Layers that the recipe ignores are scaled but not rounded.
        for name in plan.linears.keys() | fold_of.keys():
            linear, spec = model.get_submodule(name), plan.target_of(name).spec if name in plan.linears else None
            fold, dtype = fold_of.get(name), dtype_of.get(name, torch.float32)
            columns = _ScaledColumns(fold, dtype, spec, isinstance(linear, Conv1D), plan.target.value_dtype)
            parametrize.register_parametrization(linear, "weight", columns)
        self._inputs = learned_ranges(plan, seen or {}, {name: moved.scale for name, moved in fold_of.items()})
        round_inputs(model, plan, self._inputs)

    @property
    def weights(self) -> list[nn.Parameter]:
        """Empty: no weight is trained."""
        return []

    @property
    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """One group: scales and ranges."""
        return [([*self._logs.values(), *range_parameters(self._inputs)], 1.0)]

    def scales(self) -> dict[str, torch.Tensor]:
        """Current column multipliers ``1 / alpha`` by pair name, as in ``Learned.scales``."""
        return {name: torch.exp(-log.detach()) for name, log in self._logs.items()}

    def input_grids(self) -> dict[str, InputGrid] | None:
        """Current grids of static inputs by linear name; None if there are none."""
        return {name: learned.grid() for name, learned in self._inputs.items()} or None


class _Fold(nn.Module):
    """Computes a norm's scaled ``weight`` and the scale of the columns that read the norm."""

    def __init__(self, log: nn.Parameter, weight: torch.Tensor, offset: float, dtype: torch.dtype) -> None:
        super().__init__()
        self._log, self._offset, self._dtype = log, offset, dtype
        self._weight: torch.Tensor
        self.register_buffer("_weight", weight.clone())

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return fold_gain(self._weight, torch.exp(-self._log), self._offset, self._dtype)

    def scale(self) -> torch.Tensor:
        """Factor of the columns and divisor of the norm's output, ``[in]``."""
        scale: torch.Tensor = self()[1]
        return scale


class _ScaledGain(nn.Module):
    """Parametrization of a norm's weight: scaled."""

    def __init__(self, fold: _Fold) -> None:
        super().__init__()
        self._fold = fold

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = self._fold()[0]
        return scaled


class _ScaledBias(nn.Module):
    """Parametrization of a norm's bias: scaled and cast to its stored dtype."""

    def __init__(self, fold: _Fold, dtype: torch.dtype) -> None:
        super().__init__()
        self._fold, self._dtype = fold, dtype

    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        return held(bias / self._fold.scale(), self._dtype)


class _ScaledColumns(nn.Module):
    """Parametrization of a linear's weight: scaled by ``fold``, then rounded on the grid of ``spec``, if given."""

    def __init__(
        self,
        fold: _Fold | None,
        dtype: torch.dtype,
        spec: GridSpec | None,
        transposed: bool,
        value_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._fold, self._dtype, self._spec, self._transposed = fold, dtype, spec, transposed
        self._value_dtype = value_dtype

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        rows = weight.T if self._transposed else weight
        if self._fold is not None:
            rows = held(rows * self._fold.scale(), self._dtype)
        rounded = rows
        if self._spec is not None:
            rounded = held(fake_quantize_weight(rows, self._spec), self._value_dtype)
        return rounded.T if self._transposed else rounded
