"""Fake quantization: dequantized values with straight-through gradients (arXiv 2211.16912).

The gradient with respect to a value is one inside the range and zero where the value is clipped. Gradients with respect
to scales and zero points are those of the rounded result, so clipped values move the bound that clips them.
"""

from typing import Any

import torch

from calibrant.kernels.fake_rounding import rounded_gradients, rounded_values
from calibrant.quantization.activation_ranges import ACTIVATION_BITS
from calibrant.quantization.grids import GridSpec, parameters
from calibrant.quantization.token_scales import token_scales


class _Rounded(torch.autograd.Function):
    """Rounding with closed-form gradients; only the arguments are saved for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: float, qmax: float
    ) -> torch.Tensor:
        ctx.save_for_backward(values, scale, zero_point)
        ctx.range = qmin, qmax
        if _on_cpu(values):
            rows, scales, zero_points = _rows(values, scale, zero_point)
            return rounded_values(rows, scales, zero_points, qmin, qmax).view(values.shape)
        codes = (values / scale).add_(zero_point).clamp_(qmin, qmax).round_()
        return codes.sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        values, scale, zero_point = ctx.saved_tensors
        if _on_cpu(values):
            rows, scales, zero_points = _rows(values, scale, zero_point)
            of_values, *of_rows = rounded_gradients(rows, gradient.reshape(rows.shape), scales, zero_points, *ctx.range)
            of_scale, of_zero_point = (of.view(*values.shape[:-1], 1).sum_to_size(scale.shape) for of in of_rows)
            return of_values.view(values.shape), of_scale, of_zero_point, None, None
        steps = values / scale
        codes = steps + zero_point
        clamped = codes.clamp(*ctx.range)
        outside = clamped != codes
        change = clamped.round_().sub_(zero_point).sub_(steps.masked_fill_(outside, 0.0)).mul_(gradient)
        shift = gradient.masked_fill(~outside, 0.0).mul_(-scale)
        of_values = gradient.masked_fill(outside, 0.0)
        return of_values, change.sum_to_size(scale.shape), shift.sum_to_size(scale.shape), None, None


def _on_cpu(values: torch.Tensor) -> bool:
    return values.device.type == "cpu"


def _rows(
    values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values ``[.., width]`` as ``[rows, width]``; scales and zero points expanded to ``[rows]``."""
    each = (*values.shape[:-1], 1)
    return values.reshape(-1, values.shape[-1]), scale.expand(each).reshape(-1), zero_point.expand(each).reshape(-1)


def fake_quantize(
    values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: float, qmax: float
) -> torch.Tensor:
    """Quantize and dequantize float32 ``values`` ``[.., width]``: ``scale (code - zero_point)``, differentiable.

    ``scale`` and ``zero_point`` are per row, ``[.., 1]``, or scalars for all values.
    """
    rounded: torch.Tensor = _Rounded.apply(values, scale, zero_point, qmin, qmax)  # type: ignore[no-untyped-call]  # torch's own
    return rounded


def _parameters(low: torch.Tensor, high: torch.Tensor, spec: GridSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point as stored; straight-through gradients reach both bounds."""
    stored_scale, stored_zero_point = parameters(low.detach(), high.detach(), spec)
    scale = (high - low) / (spec.qmax - spec.qmin)
    scale = scale + (stored_scale - scale).detach()
    if spec.symmetric:
        return scale, stored_zero_point
    zero_point = spec.qmin - low / scale
    return scale, zero_point + (stored_zero_point - zero_point).detach()


def fake_quantize_weight(weight: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """Round ``weight`` ``[out, in]`` (float32) to nearest on the min-max grid of ``spec``.

    The ranges are computed from the weights, and gradients flow through the ranges too.
    """
    groups = weight.reshape(len(weight), -1, spec.group_size or weight.shape[1])
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if spec.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale, zero_point = _parameters(low, high, spec)
    return fake_quantize(groups, scale[..., None], zero_point[..., None], spec.qmin, spec.qmax).reshape(weight.shape)


def fake_quantize_tensor(inputs: torch.Tensor, low: torch.Tensor, high: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """Round activations as static quantization does: one asymmetric grid from ``low`` to ``high`` (scalars)."""
    scale, zero_point = _parameters(low.clamp(max=0), high.clamp(min=0), spec)
    return fake_quantize(inputs, scale, zero_point, spec.qmin, spec.qmax)


def fake_quantize_tokens(inputs: torch.Tensor) -> torch.Tensor:
    """Round activations ``[.., in]`` as dynamic quantization does: one symmetric grid per token."""
    scale, half = token_scales(inputs, ACTIVATION_BITS), 1 << (ACTIVATION_BITS - 1)
    return fake_quantize(inputs, scale, torch.zeros_like(scale), -half, half - 1)
