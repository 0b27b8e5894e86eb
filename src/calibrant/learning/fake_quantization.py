"""Rounding with gradients: the values that stored integers stand for, straight through the rounding.

Gradients are one inside the range and zero where values are clipped; scales get the gradient of what they scale, zeros
none (methods.md §19).
"""

import torch

from calibrant.compression.grids import GridSpec, parameters


def fake_quantize(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, lowest: int, highest: int
) -> torch.Tensor:
    """``scale (code - zero)`` of float32 ``values``; ``scale`` and ``zero`` broadcast to them."""
    inside = torch.clamp(values / scale + zero, lowest, highest)
    # The difference of a number and its rounding is exact, so the sum is the whole number.
    codes = inside + (torch.round(inside) - inside).detach()
    return (codes - zero) * scale


def fake_quantize_weight(weight: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """``weight`` ``[out, in]`` (float32) on the plain grid of ``spec``: what round-to-nearest stores.

    Ranges follow the weights, and gradients reach them through the ranges too.
    """
    groups = weight.reshape(len(weight), -1, spec.group_size or weight.shape[1])
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if spec.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale, zero = parameters(low, high, spec)
    return fake_quantize(groups, scale[..., None], zero[..., None], spec.lowest, spec.highest).reshape(weight.shape)


def fake_quantize_tensor(inputs: torch.Tensor, low: torch.Tensor, high: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """Activations on one asymmetric grid from ``low`` to ``high`` (scalars), as static activations are."""
    scale, zero = parameters(low.clamp(max=0), high.clamp(min=0), spec)
    return fake_quantize(inputs, scale, zero, spec.lowest, spec.highest)


def fake_quantize_tokens(inputs: torch.Tensor, bits: int) -> torch.Tensor:
    """Activations ``[.., in]`` on a symmetric grid of each token's own, as dynamic activations are."""
    levels = 1 << bits
    largest = inputs.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / ((levels - 1) / 2), 1.0)
    return fake_quantize(inputs, scale, torch.zeros_like(scale), -levels // 2, levels // 2 - 1)
