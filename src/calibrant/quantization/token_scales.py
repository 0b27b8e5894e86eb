"""Scales of activations that are quantized per token at run time."""

import torch


def token_scales(inputs: torch.Tensor, bits: int) -> torch.Tensor:
    """Scales ``[.., 1]`` of a symmetric grid per token for ``inputs`` ``[.., in]``; all-zero tokens get scale 1.

    The largest magnitude lies at ``(2**bits - 1) / 2``, as in compressed-tensors' dynamic activations.
    """
    largest = inputs.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, largest / ((2**bits - 1) / 2), 1.0)
