"""How far each group of layers alone moves the model when it is compressed to each of some strengths.

Every variant of the model differs in one group. All variants walk through the blocks together, so each block is loaded
once and a variant costs only the blocks behind its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from calibrant.calibration.calibration_set import CalibrationSet
from calibrant.errors import CalibrantError
from calibrant.modeling.entry import cast, enter_blocks
from calibrant.modeling.inputs import MicroBatch, call_block, finish
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.structure import BlockStructure, InputGroup, probe_block
from calibrant.progress import Progress
from calibrant.quantization.statistics import HessianDiagonal

# Tokens of the set that are run, and every how many of them are compared (ours).
_TOKENS = 512
_STRIDE = 4

Compress = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """``divergences[c]``: mean ``KL(original || variant)`` in nats with ``layers`` (full names) alone at choice c."""

    layers: list[str]
    elements: int
    divergences: list[float]


@torch.inference_mode()
def measure_sensitivities(
    model: LazyModel,
    blocks: list[str],
    ignored: Callable[[str], bool],
    choices: list[float],
    compress: Compress,
    calibration: CalibrationSet,
    dtype: torch.dtype,
    progress: Progress,
) -> list[Sensitivity]:
    """Of every group of linears that share an input, at each of ``choices``.

    ``compress`` gets a weight ``[out, in]``, the sums of squared inputs ``[in]`` and the choice. Measured on the window
    of 512 tokens in which most count; divergences at every fourth that does.

    Raises:
        CalibrantError: a block holds fused experts, or no token of the set counts.
    """
    probe, batches = enter_blocks(model, blocks, _one_window(calibration), dtype, model.device, _TOKENS)
    trunk, variants = batches[0], list[torch.Tensor]()
    groups: list[tuple[list[str], int]] = []
    with progress.task("measuring sensitivity", len(blocks)) as task:
        for index, prefix in enumerate(blocks):
            with model.loaded(prefix) as block:
                cast(block, dtype)
                inputs = _groups_to_compress(probe_block(block, index, probe), prefix, ignored)
                variants = [call_block(block, index, replace(trunk, hidden=hidden)) for hidden in variants]
                norms, after = _norms(block, index, inputs, trunk)
                for stage, norm in zip(inputs, norms, strict=True):
                    groups.append(_named(prefix, stage))
                    for choice in choices:
                        with _compressed(block, stage, norm, choice, compress):
                            variants.append(call_block(block, index, trunk))
                trunk.hidden = after
            task.advance()
    divergences = _divergences(model, blocks, trunk, variants, progress)
    size = len(choices)
    return [
        Sensitivity(names, elements, divergences[number * size : (number + 1) * size])
        for number, (names, elements) in enumerate(groups)
    ]


def _one_window(calibration: CalibrationSet) -> CalibrationSet:
    """Of windows that overlap by half; of equals the one that begins first, for what comes before is missing there."""
    length = calibration.mask.shape[1]
    last = max(0, length - _TOKENS)
    begins = [*range(0, last, _TOKENS // 2), last]
    counted = torch.stack([calibration.mask[:, begin : begin + _TOKENS].sum(1) for begin in begins])
    window, row = divmod(int((counted == counted.max()).flatten().nonzero()[0]), len(calibration.mask))
    rows, here = slice(row, row + 1), slice(begins[window], begins[window] + _TOKENS)
    return replace(calibration, tokens=calibration.tokens[rows, here], mask=calibration.mask[rows, here])


def _groups_to_compress(structure: BlockStructure, prefix: str, ignored: Callable[[str], bool]) -> list[InputGroup]:
    stages = structure.without(lambda name: ignored(f"{prefix}.{name}")).stages
    groups = [stage for stage in stages if isinstance(stage, InputGroup)]
    if len(groups) < len(stages):
        raise CalibrantError(f"{prefix}: its experts are fused, so a budget cannot be spread over them")
    return groups


def _named(prefix: str, group: InputGroup) -> tuple[list[str], int]:
    sizes = (linear.out_features * linear.in_features for linear in group.linears)
    return [f"{prefix}.{linear.name}" for linear in group.linears], sum(sizes)


def _norms(
    block: nn.Module, index: int, groups: list[InputGroup], trunk: MicroBatch
) -> tuple[list[HessianDiagonal], torch.Tensor]:
    """Squared inputs of every group in the unchanged block, and its output."""
    norms = [HessianDiagonal(group.linears[0].in_features, trunk.hidden.device) for group in groups]
    handles = []
    for group, norm in zip(groups, norms, strict=True):

        def note(_: nn.Module, args: tuple[torch.Tensor, ...], norm: HessianDiagonal = norm) -> None:
            norm.add(args[0].reshape(-1, args[0].shape[-1])[trunk.mask.flatten()])

        handles.append(block.get_submodule(group.module).register_forward_pre_hook(note))
    try:
        return norms, call_block(block, index, trunk)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _compressed(
    block: nn.Module, group: InputGroup, norm: HessianDiagonal, choice: float, compress: Compress
) -> Iterator[None]:
    views = [linear.view(block.get_parameter(linear.parameter).data) for linear in group.linears]
    kept = [view.clone() for view in views]
    try:
        for view in views:
            view.copy_(compress(view.float(), norm.values, choice))
        yield
    finally:
        for view, values in zip(views, kept, strict=True):
            view.copy_(values)


def _divergences(
    model: LazyModel, blocks: list[str], trunk: MicroBatch, variants: list[torch.Tensor], progress: Progress
) -> list[float]:
    """Mean ``KL(trunk || variant)`` over the compared positions."""
    model.load(model.names_outside(blocks))
    model.module.tie_weights()
    cast(model.module, trunk.hidden.dtype)
    positions = trunk.mask[0].nonzero()[::_STRIDE, 0]
    found = []
    try:
        with progress.task("comparing", len(variants)) as task:
            expected = torch.log_softmax(finish(model.module, blocks, trunk.hidden[:, positions])[0].double(), -1)
            for hidden in variants:
                logits = finish(model.module, blocks, hidden[:, positions])[0].double()
                difference = expected - torch.log_softmax(logits, -1)
                found.append(float((expected.exp() * difference).sum(-1).mean().clamp(min=0)))
                task.advance()
    finally:
        model.drop(model.module)
    return found
