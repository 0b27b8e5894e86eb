"""The attention module and the MLP of a block, found from the data flow and verified by a trial."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from calibrant.errors import CalibrantError
from calibrant.modeling.block_walk import OpenedBlock
from calibrant.modeling.hooks import swapped
from calibrant.modeling.structure import InputGroup, Linear, common_module

_UNCHANGED = 1e-3


@dataclass(frozen=True)
class BlockParts:
    """Parts of a block.

    Attributes:
        into: linears of the MLP whose outputs form the neurons.
        down: linear of the MLP that reads the neurons.
        attention_out: last linear of the attention module.
        attention_parameters, mlp_parameters: numbers of parameters.
    """

    into: tuple[Linear, ...]
    down: Linear
    attention_out: Linear
    attention_parameters: int
    mlp_parameters: int

    @property
    def neurons(self) -> int:
        """Width of the MLP."""
        return self.down.in_features

    def narrow(self, parameters: dict[str, torch.Tensor], kept: torch.Tensor) -> dict[str, torch.Tensor]:
        """Those of ``parameters`` that have a neuron dimension, reduced to the neurons ``kept``, in that order."""
        narrowed = {}
        for linear in self.into:
            narrowed[linear.parameter] = parameters[linear.parameter].index_select(int(linear.transposed), kept)
            bias = f"{linear.name}.bias"
            if bias in parameters:
                narrowed[bias] = parameters[bias].index_select(0, kept)
        down = self.down
        narrowed[down.parameter] = parameters[down.parameter].index_select(1 - int(down.transposed), kept)
        return narrowed

    def without_attention(self, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Zeros for those of ``parameters`` that produce the attention module's output."""
        names = (self.attention_out.parameter, f"{self.attention_out.name}.bias")
        return {name: torch.zeros_like(parameters[name]) for name in names if name in parameters}


def find_parts(block: OpenedBlock) -> BlockParts:
    """Find the parts of ``block``, which computes in float32.

    Two consecutive stages are the MLP if permuting the neurons between them leaves the block's output unchanged.

    Raises:
        CalibrantError: no two stages are the MLP, or the last linear of attention is ambiguous.
    """
    module = block.module
    stages = block.structure.stages
    groups = [stage for stage in stages if isinstance(stage, InputGroup)]
    if len(groups) < len(stages):
        groups = []  # MLPs of fused experts cannot be narrowed
    for first, second in itertools.pairwise(groups):
        into, down = first.linears, second.linears[0]
        if len(second.linears) > 1 or any(linear.out_features != down.in_features for linear in into):
            continue
        alone = [group.linears[0] for group in groups if group not in (first, second) and len(group.linears) == 1]
        outs = [linear for linear in alone if linear.out_features == down.out_features]
        before = [linear for group in groups[: groups.index(first)] for linear in group.linears]
        if len(outs) != 1 or outs[0] not in before:
            continue
        parts = BlockParts(into, down, outs[0], _count(module, before), _count(module, [*into, down]))
        if _interchangeable(block, parts):
            return parts
    raise CalibrantError(f"{block.name}: no attention with an MLP of plain linears behind it, so 2ssp cannot prune it")


def _count(block: nn.Module, linears: list[Linear]) -> int:
    """Number of parameters in the innermost module around ``linears``; if that is the block, in the linears alone."""
    around = common_module([linear.name for linear in linears])
    modules = [block.get_submodule(around)] if around else [block.get_submodule(one.name) for one in linears]
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _interchangeable(block: OpenedBlock, parts: BlockParts) -> bool:
    """Whether a permutation of the neurons leaves the block's output unchanged."""
    expected = block.run(block.probe)
    order = torch.randperm(parts.neurons, generator=torch.Generator().manual_seed(0)).to(expected.device)
    with narrowed(block.module, parts, order):
        found = block.run(block.probe)
    return float((found - expected).norm()) <= _UNCHANGED * float((expected - block.probe.hidden).norm())


@contextmanager
def narrowed(block: nn.Module, parts: BlockParts, kept: torch.Tensor) -> Iterator[None]:
    """Context in which the block's MLP has only the neurons ``kept``, in that order."""
    widths = [module for linear in parts.into if isinstance(module := block.get_submodule(linear.name), Conv1D)]
    try:
        for module in widths:
            module.nf = len(kept)  # Conv1D reshapes its output to this width
        with swapped(_by_parameter(block, parts.narrow(_parameters(block), kept))):
            yield
    finally:
        for module in widths:
            module.nf = parts.neurons


@contextmanager
def attention_left_out(block: nn.Module, parts: BlockParts) -> Iterator[None]:
    """Context in which the output of the block's attention module is zero."""
    with swapped(_by_parameter(block, parts.without_attention(_parameters(block)))):
        yield


def _parameters(block: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in block.named_parameters()}


def _by_parameter(block: nn.Module, values: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(block.get_parameter(name), value) for name, value in values.items()]
