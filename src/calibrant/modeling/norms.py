"""Faster bfloat16 root-mean-square norms on CPUs (arXiv 1910.07467, equation 4)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from calibrant.kernels.rms_norm import rms_norm
from calibrant.modeling.kernel_forward import has_kernel

# Inputs of this scale make epsilon matter, so that the probe finds it among the numbers that a module has.
_PROBE_ROWS, _PROBE_SCALE = 4, 1e-3
# Offset of the gain, and whether the normalized input is rounded before it is multiplied with the gain.
_FORMS = ((0.0, True), (0.0, False), (1.0, False))
# Relative error of one bfloat16 rounding; different forms differ by a second rounding.
_TOLERANCE = 2**-7


@dataclass(frozen=True)
class _Norm:
    """RMS norm with the gain ``offset + weight``.

    ``rounded_first``: the normalized input is rounded before it is multiplied with the gain (Llama); OLMo 2 and Gemma
    round only the product.
    """

    epsilon: float
    offset: float
    rounded_first: bool

    def apply(self, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(inputs, weight.detach().float() + self.offset, self.epsilon, self.rounded_first)


def use_fast_norms(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replace the forward of every RMS norm of ``model`` by our kernel.

    Modules are recognized by what they compute, not by name: on random inputs with a random weight the module must give
    the kernel's result, with one of the module's float attributes as epsilon. Does nothing for other dtypes than
    bfloat16 and devices other than the CPU.
    """
    if dtype is not torch.bfloat16 or device.type != "cpu":
        return
    for module in model.modules():
        if has_kernel(module):
            continue
        norm = _norm_of(module)
        if norm is not None:
            module.forward = _forward(module, norm)


def _forward(module: nn.Module, norm: _Norm) -> Callable[..., torch.Tensor]:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        if len(args) == 1 and not kwargs and args[0].dtype is torch.bfloat16:
            return norm.apply(args[0], module.get_parameter("weight"))
        # Gated norms (Mamba 2's) are plain ones without their second argument.
        result: torch.Tensor = original(*args, **kwargs)
        return result

    return forward


def _norm_of(module: nn.Module) -> _Norm | None:
    """The RMS norm that ``module`` computes; None if it computes anything else."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    if list(shapes) != ["weight"] or len(shapes["weight"]) != 1 or next(module.children(), None) is not None:
        return None
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shapes["weight"], generator=generator).bfloat16()
    inputs = (_PROBE_SCALE * torch.randn(_PROBE_ROWS, len(weight), generator=generator)).bfloat16()
    try:
        expected = functional_call(module, {"weight": weight}, (inputs,))
    except Exception:  # it expects other arguments than one tensor, and model code raises anything without them
        return None
    if not isinstance(expected, torch.Tensor) or expected.shape != inputs.shape or expected.dtype is not inputs.dtype:
        return None
    numbers = [value for value in vars(module).values() if isinstance(value, float) and value > 0]
    norms = [_Norm(number, *form) for number in numbers for form in _FORMS]
    closest = min(norms, key=lambda norm: _relative_difference(norm.apply(inputs, weight), expected), default=None)
    return (
        closest
        if closest is not None and _relative_difference(closest.apply(inputs, weight), expected) <= _TOLERANCE
        else None
    )


def _relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative difference of any element."""
    return float(((found.float() - expected.float()).abs() / expected.float().abs().clamp(min=1e-30)).max())
