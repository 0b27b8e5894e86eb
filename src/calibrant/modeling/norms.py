"""A faster root-mean-square norm for modules that compute just that, in bfloat16 on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from calibrant.kernels.rms_norm import rms_norm
from calibrant.modeling.kernel_forward import has_kernel

# Inputs this small make epsilon count, so that the right one among a module's numbers is found.
_PROBE_ROWS, _PROBE_SCALE = 4, 1e-3
# What is added to the weight, and whether the product's first factor is rounded.
_FORMS = ((0.0, True), (0.0, False), (1.0, False))
# One rounding of bfloat16; forms differ by a second one.
_SAME = 2**-7


@dataclass(frozen=True)
class _Norm:
    """An RMS norm whose gain is ``offset`` plus its weight.

    ``rounded_first``: before the product with the gain, as Llama has it; OLMo 2 and Gemma round once, behind it.
    """

    epsilon: float
    offset: float
    rounded_first: bool

    def apply(self, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(inputs, weight.detach().float() + self.offset, self.epsilon, self.rounded_first)


def use_fast_norms(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give every module that computes an RMS norm with its one weight the kernel; anything else stays as it is.

    A module is known by what it computes, not by its name: it is run on random numbers with a random weight, and must
    give the kernel's result for one of the numbers it holds as epsilon.
    """
    if dtype is not torch.bfloat16 or device.type != "cpu":
        return
    for module in model.modules():
        if has_kernel(module):
            continue
        norm = _norm_of(module)
        if norm is not None:
            module.forward = _forward(module, norm)


def _forward(module: nn.Module, norm: _Norm) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        return norm.apply(hidden_states, module.get_parameter("weight"))

    return forward


def _norm_of(module: nn.Module) -> _Norm | None:
    """Which RMS norm ``module`` is; None if it is something else."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    if list(shapes) != ["weight"] or len(shapes["weight"]) != 1 or next(module.children(), None) is not None:
        return None
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shapes["weight"], generator=generator).bfloat16()
    inputs = (_PROBE_SCALE * torch.randn(_PROBE_ROWS, len(weight), generator=generator)).bfloat16()
    try:
        expected = functional_call(module, {"weight": weight}, (inputs,))
    except (RuntimeError, TypeError, ValueError):  # it takes something else than one tensor
        return None
    if not isinstance(expected, torch.Tensor) or expected.shape != inputs.shape or expected.dtype is not inputs.dtype:
        return None
    numbers = [value for value in vars(module).values() if isinstance(value, float) and value > 0]
    norms = [_Norm(number, *form) for number in numbers for form in _FORMS]
    closest = min(norms, key=lambda norm: _distance(norm.apply(inputs, weight), expected), default=None)
    return closest if closest is not None and _distance(closest.apply(inputs, weight), expected) <= _SAME else None


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative difference."""
    return float(((found.float() - expected.float()).abs() / expected.float().abs().clamp(min=1e-30)).max())
