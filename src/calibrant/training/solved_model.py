"""A whole compressed model whose scales and kept weights are trained; codes and zeros stay."""

from collections.abc import Mapping
from dataclasses import replace

import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from calibrant.formats.quantized import Codes
from calibrant.modeling.learned_values import changed_scale, kept_weight, numbers_and_scale, scaled_weight
from calibrant.quantization.grids import GridSpec

# Kept weights learn at this share of the learning rate, relative to the root mean square of their layer (ours).
_WEIGHT_RATE = 0.15


class SolvedModel:
    """``model`` changed in place: its solved linears compute with what would be stored.

    Trainable are the scales of quantized linears, as factors, and the weights of pruned ones that are not zero;
    everything else is frozen.

    Args:
        model: in float32.
        codes: of the quantized linears, by full name.
        specs: their grids.
        pruned: stored dtypes of the pruned linears' weights, by full name.
        value_dtype: dtype that loaders give quantized weights.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        codes: Mapping[str, Codes],
        specs: Mapping[str, GridSpec],
        pruned: Mapping[str, torch.dtype],
        value_dtype: torch.dtype,
    ) -> None:
        self.model, self._codes = model.requires_grad_(False).eval(), codes
        self._scales: dict[str, _Scales] = {}
        self._kept: dict[str, _Kept] = {}
        for name, own in codes.items():
            linear = model.get_submodule(name)
            self._scales[name] = _Scales(own, specs[name], isinstance(linear, Conv1D), value_dtype).to(model.device)
            # The weight is made of codes and scales; what was loaded would stay in memory without use.
            linear.weight = nn.Parameter(torch.empty(0, device=model.device), requires_grad=False)
            parametrize.register_parametrization(linear, "weight", self._scales[name], unsafe=True)
        for name, dtype in pruned.items():
            linear = model.get_submodule(name)
            self._kept[name] = _Kept(linear.get_parameter("weight").data, dtype)
            parametrize.register_parametrization(linear, "weight", self._kept[name])
            self._original(name).requires_grad_(True)

    @property
    def weights(self) -> list[nn.Parameter]:
        """Empty: sharpness is not measured."""
        return []

    @property
    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Changes of scales, whose rate is in steps of the grid at its end; then the weights of each pruned linear."""
        by_rate: dict[float, list[nn.Parameter]] = {}
        for scales in self._scales.values():
            by_rate.setdefault(scales.rate, []).append(scales.change)
        kept = [([self._original(name)], _WEIGHT_RATE * kept.size) for name, kept in self._kept.items()]
        return [(changes, rate) for rate, changes in by_rate.items()] + kept

    def codes(self) -> dict[str, Codes]:
        """The codes with their current scales, by full name of the linear."""
        return {
            name: replace(codes, scale=self._scales[name].scale().detach().to(codes.scale.device, codes.scale.dtype))
            for name, codes in self._codes.items()
        }

    def pruned(self) -> dict[str, torch.Tensor]:
        """The current weights of pruned linears, as the model has them, by full name of the linear."""
        return {name: kept(self._original(name)).detach().to(kept.dtype) for name, kept in self._kept.items()}

    def _original(self, name: str) -> nn.Parameter:
        original: nn.Parameter = self.model.get_parameter(f"{name}.parametrizations.weight.original")
        return original


class _Scales(nn.Module):
    """Parametrization that puts a weight of learned scales in the place of another."""

    def __init__(self, codes: Codes, spec: GridSpec, transposed: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self._spec, self._transposed, self._dtype = spec, transposed, dtype
        numbers, before = numbers_and_scale(codes)
        self._numbers: torch.Tensor
        self._before: torch.Tensor
        self.register_buffer("_numbers", numbers.to(torch.int16))
        self.register_buffer("_before", before)
        self.rate = 1 / (2 ** (spec.bits - 1) if spec.symmetric else 2**spec.bits - 1)
        self.change = nn.Parameter(torch.zeros_like(before))

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        weight = scaled_weight(self._numbers, self.scale(), self._dtype)
        return weight.T if self._transposed else weight

    def scale(self) -> torch.Tensor:
        """Scales as they would be stored, float32 ``[rows, groups]``."""
        return changed_scale(self._before, self.change, self._spec)


class _Kept(nn.Module):
    """Parametrization of a pruned weight: its zeros stay."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.size = float(weight.square().mean().sqrt())
        self._mask: torch.Tensor
        self.register_buffer("_mask", weight != 0)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return kept_weight(weight, self._mask, self.dtype)
