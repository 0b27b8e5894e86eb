"""Faster float32 linears on CPUs: oneDNN's product, where torch takes that of its BLAS library."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def use_fast_linears(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Make every linear of ``model`` a ``FastLinear``.

    Does nothing for other dtypes than float32, devices other than the CPU, and builds of torch without oneDNN.
    """
    if dtype is not torch.float32 or device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            # A forward of the instance would be a cycle of references, which keeps weights in memory.
            module.__class__ = FastLinear


class FastLinear(nn.Linear):
    """A linear whose product of contiguous float32 tensors on the CPU is oneDNN's; gradients flow through it."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weight = self.weight  # once: a parametrized weight is computed at every access
        tensors = (inputs, weight) if self.bias is None else (inputs, weight, self.bias)
        plain = all(one.dtype is torch.float32 and one.device.type == "cpu" and one.is_contiguous() for one in tensors)
        if not plain or not inputs.numel() or torch.is_autocast_enabled("cpu"):
            return functional.linear(inputs, weight, self.bias)
        result: torch.Tensor = _Product.apply(*tensors)  # type: ignore[no-untyped-call]  # torch's own
        return result


class _Product(torch.autograd.Function):
    """``x W^T + b`` of ``inputs`` x ``[..., in]``, ``weight`` W ``[out, in]`` and perhaps ``bias`` b ``[out]``.

    Only the product itself is oneDNN's: with transposed operands, as gradients have them, its rate is no better.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        of_inputs, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(inputs if of_weight else None, weight if of_inputs else None)
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            gradient @ weight if needed[0] else None,
            rows.T @ inputs.reshape(-1, inputs.shape[-1]) if needed[1] else None,
            *((rows.sum(0) if needed[2] else None,) if len(needed) > 2 else ()),
        )
