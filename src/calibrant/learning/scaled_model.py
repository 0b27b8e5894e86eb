"""A whole model with channel scales between norms and rounded linears: what Quadapter's second phase trains."""

from dataclasses import dataclass

import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from calibrant.compression.activation_ranges import InputGrid
from calibrant.compression.grids import GridSpec
from calibrant.compression.plan import Plan
from calibrant.learning.fake_quantization import fake_quantize_weight
from calibrant.learning.learned_range import SeenInput, learned_ranges, range_parameters, round_inputs
from calibrant.modeling.foldable import FoldablePair


@dataclass(frozen=True)
class PlacedPair:
    """A foldable pair of the block at ``prefix``."""

    prefix: str
    pair: FoldablePair

    @property
    def name(self) -> str:
        """Full name of the first linear behind the norm."""
        return f"{self.prefix}.{self.pair.group.module}"


class ScaledModel:
    """``model`` changed in place: norms multiplied by ``alpha``, columns behind them divided by it and rounded.

    The logarithms of ``alpha`` and static input ranges can be trained, no weight can.

    Args:
        model: in float32.
        plan: with the scales that training begins with (``1 / alpha``).
        pairs: where they are.
        seen: inputs of the unscaled linears by full name, where activations are static.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        plan: Plan,
        pairs: list[PlacedPair],
        seen: dict[str, SeenInput] | None,
    ) -> None:
        assert plan.scales is not None
        self.model = model.requires_grad_(False).eval()
        self._logs = {
            placed.name: nn.Parameter(-plan.scales[placed.name].detach().clone().float().log()) for placed in pairs
        }
        log_of: dict[str, nn.Parameter] = {}
        for placed in pairs:
            producer, log = placed.pair.producer, self._logs[placed.name]
            norm = model.get_submodule(f"{placed.prefix}.{producer.norm}")
            parametrize.register_parametrization(norm, "weight", _ScaledGain(log, producer.offset))
            if producer.bias is not None:
                parametrize.register_parametrization(norm, "bias", _ScaledGain(log, 0.0))
            log_of |= {f"{placed.prefix}.{linear.name}": log for linear in placed.pair.group.linears}
        # Layers that a recipe ignores are scaled, not rounded.
        for name in plan.linears.keys() | log_of.keys():
            linear, spec = model.get_submodule(name), plan.spec_for(name) if name in plan.linears else None
            columns = _ScaledColumns(log_of.get(name), spec, isinstance(linear, Conv1D))
            parametrize.register_parametrization(linear, "weight", columns)
        self._inputs = learned_ranges(plan, seen or {}, log_of)
        round_inputs(model, plan, self._inputs)

    @property
    def weights(self) -> list[nn.Parameter]:
        """None of them is trained."""
        return []

    @property
    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Scales and ranges."""
        return [([*self._logs.values(), *range_parameters(self._inputs)], 1.0)]

    def scales(self) -> dict[str, torch.Tensor]:
        """What columns are multiplied by, as a plan has them."""
        return {name: torch.exp(-log.detach()) for name, log in self._logs.items()}

    def input_grids(self) -> dict[str, InputGrid] | None:
        """The grids of static inputs as they are now."""
        return {name: learned.grid() for name, learned in self._inputs.items()} or None


class _ScaledGain(nn.Module):
    """A norm's gain, stored less ``offset``, times ``alpha``."""

    def __init__(self, log: nn.Parameter, offset: float) -> None:
        super().__init__()
        self._log, self._offset = log, offset

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight + self._offset) * self._log.exp() - self._offset


class _ScaledColumns(nn.Module):
    """A linear's weight, its columns divided by ``alpha``, on the plain grid that this gives if it is rounded."""

    def __init__(self, log: nn.Parameter | None, spec: GridSpec | None, transposed: bool) -> None:
        super().__init__()
        self._log, self._spec, self._transposed = log, spec, transposed

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        rows = weight.T if self._transposed else weight
        rows = rows / self._log.exp() if self._log is not None else rows
        rounded = fake_quantize_weight(rows, self._spec) if self._spec is not None else rows
        return rounded.T if self._transposed else rounded
