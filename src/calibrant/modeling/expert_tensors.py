"""How a checkpoint with one linear per expert names the parts of fused expert weights."""

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
from transformers.utils.quantization_config import QuantizationMethod

from calibrant.modeling.structure import fused_parameters


@dataclass(frozen=True)
class ExpertTensor:
    """A linear of one expert: checkpoint name without ".weight", expert, and its rows of the expert's fused matrix."""

    name: str
    expert: int
    rows: torch.Tensor


def expert_tensors(model: PreTrainedModel, parameter: str, shape: tuple[int, ...]) -> list[ExpertTensor]:
    """The linears that the fused ``parameter`` of ``shape`` is made of; empty if transformers reads no such linears.

    transformers' rules that turn fused weights into a checkpoint are applied to the numbers of the rows. It builds some
    experts (Llama 4's) as separate linears if their weights are quantized; those have rules of their own there.
    """
    if is_split(model, parameter):
        return _split(parameter, shape)
    experts, rows = shape[0], shape[1]
    numbers = torch.arange(experts * rows).view(experts, rows, 1)
    found = []
    for name, tensor in revert_weight_conversion(model, {parameter: numbers}).items():
        if tensor.ndim != 2 or tensor.shape[1] != 1 or not name.endswith(".weight"):
            return []
        expert, own = tensor[:, 0] // rows, tensor[:, 0] % rows
        found.append(ExpertTensor(name.removesuffix(".weight"), int(expert[0]), own))
    return found


def is_split(model: PreTrainedModel, parameter: str) -> bool:
    """Whether transformers replaces the experts by separate linears in models of compressed-tensors."""
    owner = type(model.get_submodule(parameter.rpartition(".")[0])).__name__
    patch: dict[str, Any] | None = MODULES_TO_PATCH_FOR_QUANTIZATION.get(owner)
    return patch is not None and QuantizationMethod.COMPRESSED_TENSORS in patch["quantization_methods"]


@dataclass(frozen=True)
class SplitExperts:
    """The fused ``parameter`` of ``shape`` ``[experts, in, out]``, stored as the linears ``parts``."""

    parameter: str
    shape: tuple[int, ...]
    parts: list[ExpertTensor]

    @property
    def stored(self) -> list[str]:
        """Names of the stored weights."""
        return [f"{part.name}.weight" for part in self.parts]

    def joined(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The value of the parameter; ``read`` gives the stored weights ``[out, in]``."""
        joined: torch.Tensor | None = None
        for part, name in zip(self.parts, self.stored, strict=True):
            weight = read(name)
            joined = torch.empty(self.shape, dtype=weight.dtype) if joined is None else joined
            joined[part.expert][:, part.rows] = weight.T
        assert joined is not None
        return joined


def split_experts(model: PreTrainedModel, names: Container[str]) -> list[SplitExperts]:
    """The fused parameters of ``model`` that a checkpoint with the tensors ``names`` stores as separate linears."""
    found = []
    for parameter, values in fused_parameters(model).items():
        if is_split(model, parameter):
            one = SplitExperts(parameter, tuple(values.shape), _split(parameter, tuple(values.shape)))
            if all(name in names for name in one.stored):
                found.append(one)
    return found


def join_split_experts(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> None:
    """Replace, in a checkpoint's ``state``, linears of experts by the fused parameters that ``model`` has for them."""
    for experts in split_experts(model, state):
        state[experts.parameter] = experts.joined(state.pop)


def _split(parameter: str, shape: tuple[int, ...]) -> list[ExpertTensor]:
    """Gates and ups one after the other; the weights are stored ``[experts, in, out]``."""
    owner, _, leaf = parameter.rpartition(".")
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    rows = torch.arange(shape[2]).chunk(len(parts))
    return [
        ExpertTensor(f"{owner}.{expert}.{part}", expert, own)
        for expert in range(shape[0])
        for part, own in zip(parts, rows, strict=True)
    ]
