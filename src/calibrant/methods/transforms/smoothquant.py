"""SmoothQuant: move part of the activations' range into the weights (arXiv 2211.10438)."""

import torch

_SMALLEST = 1e-5


def smoothquant_scale(input_maximum: torch.Tensor, weights: list[torch.Tensor], alpha: float) -> torch.Tensor:
    """``max|x_j|^alpha / max|W_j|^(1 - alpha)``, float32 ``[in]``; it divides inputs and multiplies weight columns.

    ``input_maximum`` ``[in]`` is ``max|x_j|`` over all counted tokens; ``weights`` are those ``[out, in]`` of every
    linear that reads the input.
    """
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp(min=_SMALLEST)
    scale = input_maximum.clamp(min=0).pow(alpha) / largest.pow(1 - alpha)
    # A channel whose input is always 0 is not scaled.
    return torch.where(input_maximum > 0, scale.clamp(min=_SMALLEST), 1.0)
