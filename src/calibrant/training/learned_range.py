"""Rounding of linears' inputs in training: per token, or on a learned static range."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calibrant.errors import CalibrantError
from calibrant.modeling.hooks import Hook, hooked
from calibrant.modeling.token_rows import TokenRows
from calibrant.quantization.activation_ranges import ACTIVATION_BITS, InputGrid
from calibrant.quantization.grids import GridSpec, parameters
from calibrant.recipes.plan import Plan
from calibrant.training.fake_quantization import fake_quantize_tensor, fake_quantize_tokens

# Number of recent inputs compared; linears that share an input are called close together.
_RECENT = 4

# Returns the divisor of each input channel, ``[in]``.
Divisor = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class SeenInput:
    """Minimum and maximum of each input channel, ``[in]``; ``leader`` is the first linear that reads the input."""

    leader: str
    low: torch.Tensor
    high: torch.Tensor


class LearnedRange(nn.Module):
    """A static range: learned factors of the observed range, whose channels are first divided by ``divisor``, if given.

    An empty range stays empty.
    """

    def __init__(self, seen: SeenInput, scale_dtype: torch.dtype, divisor: Divisor | None = None) -> None:
        super().__init__()
        self._spec, self._seen, self._divisor = GridSpec(ACTIVATION_BITS, False, None, scale_dtype), seen, divisor
        self.low = nn.Parameter(torch.zeros((), device=seen.low.device))
        self.high = nn.Parameter(torch.zeros((), device=seen.low.device))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return fake_quantize_tensor(inputs, *self._range(), self._spec)

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        divisor = self._divisor() if self._divisor is not None else 1.0
        low, high = (self._seen.low / divisor).amin().clamp(max=0), (self._seen.high / divisor).amax().clamp(min=0)
        return low * self.low.exp(), high * self.high.exp()

    @torch.no_grad()
    def grid(self) -> InputGrid:
        low, high = self._range()
        scale, zero_point = parameters(low[None], high[None], self._spec)
        return InputGrid(scale.to(self._spec.scale_dtype).cpu(), zero_point.to(torch.int8).cpu())


def learned_ranges(plan: Plan, seen: dict[str, SeenInput], divisors: Mapping[str, Divisor]) -> dict[str, LearnedRange]:
    """Ranges by linear name, shared by linears that read the same tensor; linears that were not ``seen`` have none."""
    by_leader: dict[str, LearnedRange] = {}
    for name in plan.linears:
        spec = plan.target_of(name).spec
        if name in seen and spec is not None and seen[name].leader not in by_leader:
            by_leader[seen[name].leader] = LearnedRange(seen[name], spec.scale_dtype, divisors.get(name))
    return {name: by_leader[seen[name].leader] for name in plan.linears if name in seen}


def range_parameters(ranges: dict[str, LearnedRange]) -> list[nn.Parameter]:
    """Parameters of the ranges, without duplicates."""
    return [parameter for learned in dict.fromkeys(ranges.values()) for parameter in (learned.low, learned.high)]


def round_inputs(model: nn.Module, plan: Plan, ranges: dict[str, LearnedRange]) -> None:
    """Install hooks that round the inputs of the plan's linears in ``model``, if the recipe quantizes activations."""
    if plan.recipe.scheme.activations is None:
        return

    def hook(learned: LearnedRange | None) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def rounded(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            # float32 even under bfloat16 autocast: scales computed in bfloat16 would differ from the stored ones.
            inputs = args[0].float()
            return (learned(inputs) if learned is not None else fake_quantize_tokens(inputs), *args[1:])

        return rounded

    for name in plan.linears:
        model.get_submodule(name).register_forward_pre_hook(hook(ranges.get(name)))


@torch.no_grad()
def see_inputs(model: nn.Module, names: list[str], batches: Iterable[TokenRows], causal: bool) -> dict[str, SeenInput]:
    """Observe the inputs of the linears ``names`` over counted tokens; linears that read one tensor share a result.

    Raises:
        CalibrantError: a linear's input does not have one row per token.
    """
    found: dict[str, SeenInput] = {}
    leaders: dict[str, str] = {}
    recent: deque[tuple[torch.Tensor, str]] = deque(maxlen=_RECENT)
    batch: list[torch.Tensor] = []

    def note(name: str, inputs: torch.Tensor) -> None:
        leader = leaders.setdefault(name, next((first for one, first in recent if one is inputs), name))
        recent.append((inputs, leader))
        (counted,) = batch
        if inputs.shape[:-1].numel() != counted.numel():
            raise CalibrantError(
                f"{name}: is given other rows than the tokens, so its range cannot be learned; ignore it"
            )
        rows = inputs.reshape(*counted.shape, -1)[counted]
        low, high = rows.float().aminmax(dim=0)
        if leader in found:
            low, high = torch.minimum(found[leader].low, low), torch.maximum(found[leader].high, high)
        found[leader] = SeenInput(leader, low, high)

    def hook(name: str) -> Hook:
        return lambda _, args, kwargs: note(name, args[0])

    with hooked((model.get_submodule(name), hook(name)) for name in names):
        for rows in batches:
            batch[:] = [rows.counted]
            model(**rows.model_inputs(causal))
    return {name: found[leader] for name, leader in leaders.items()}
