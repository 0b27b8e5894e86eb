"""What a solved linear still holds as floating-point numbers, as functions of what is trained."""

import torch

from calibrant.formats.quantized import Codes
from calibrant.modeling.foldable import held
from calibrant.quantization.grids import GridSpec, trained_scale


def numbers_and_scale(codes: Codes) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes less their zero points, float32 ``[rows, groups, columns]``, and scales, float32 ``[rows, groups]``."""
    grouped = codes.codes.reshape(*codes.scale.shape, -1).float()
    return grouped - codes.zero_point[..., None].float(), codes.scale.clone().float()


def changed_scale(scale: torch.Tensor, change: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """``scale`` times ``1 + change`` as it would be stored, float32; gradients go straight through the rounding."""
    changed = scale * (1 + change)
    return changed + (trained_scale(changed.detach(), scale, spec) - changed).detach()


def scaled_weight(numbers: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight ``[rows, columns]``, in float32 but rounded to ``dtype``, of what ``numbers_and_scale`` gives."""
    return held((numbers * scale[..., None]).flatten(1), dtype)


def kept_weight(weight: torch.Tensor, kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``weight`` where ``kept``, else 0, in float32 but rounded to ``dtype``."""
    return held(weight * kept, dtype)
