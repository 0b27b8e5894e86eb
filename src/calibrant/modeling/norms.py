"""A faster root-mean-square norm for modules that compute just that, in bfloat16 on a CPU."""

from collections.abc import Callable

import torch
from torch import nn
from torch.func import functional_call

from calibrant.kernels.rms_norm import rms_norm

# Inputs this small make epsilon count, so that the right one among a module's numbers is found.
_PROBE_ROWS, _PROBE_SCALE = 4, 1e-3


def use_fast_norms(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give every module that computes ``rms_norm`` with its one weight the kernel; anything else stays as it is.

    A module is known by what it computes, not by its name: it is run on random numbers with a random weight, and must
    give the kernel's result for one of the numbers it holds as epsilon.
    """
    if dtype is not torch.bfloat16 or device.type != "cpu":
        return
    for module in model.modules():
        if "forward" in vars(module):  # it has the kernel already
            continue
        epsilon = _epsilon(module)
        if epsilon is not None:
            module.forward = _forward(module, epsilon)


def _forward(module: nn.Module, epsilon: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, module.get_parameter("weight"), epsilon)

    return forward


def _epsilon(module: nn.Module) -> float | None:
    """The epsilon with which ``module`` is an RMS norm; None if it is something else."""
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
    return next((number for number in numbers if _same(rms_norm(inputs, weight, number), expected)), None)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal up to one rounding of the normed value and one of its product with the weight."""
    return torch.allclose(left.float(), right.float(), rtol=2**-6, atol=0.0)
