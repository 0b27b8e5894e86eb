"""Transforms of one block before it is solved: what its inputs look like, which scales follow, folding them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from calibrant.methods.solvers.rtn import rtn
from calibrant.methods.transforms.awq import awq_candidates, best_scale
from calibrant.methods.transforms.smoothquant import smoothquant_scale
from calibrant.modeling.block_walk import OpenedBlock
from calibrant.modeling.foldable import FoldablePair, find_foldable
from calibrant.modeling.hooks import Hook, hooked, swapped
from calibrant.modeling.inputs import MicroBatch
from calibrant.modeling.module_call import ModuleCall
from calibrant.modeling.structure import InputGroup, Linear, common_module
from calibrant.quantization.grids import GridSpec
from calibrant.quantization.statistics import Magnitude
from calibrant.recipes.parts import Awq, Quadapter, SmoothQuant
from calibrant.recipes.plan import Plan

# AWQ compares outputs on this many counted tokens, or one micro-batch where a module cannot be run on part of it (ours;
# the paper's code takes its whole set, 65,536 of them).
_SEARCH_TOKENS = 1024
# Where few tokens count, so many are gone through for them (ours).
_SEARCH_POSITIONS = 4096


@dataclass
class Transformed:
    """Names of the parameters that changed, a sentence on each transform, and what the block gave on each batch."""

    changed: set[str] = field(default_factory=set)
    outputs: list[torch.Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Seen:
    """What a pass over the calibration data showed of one pair: magnitudes, and what to compare outputs with.

    That is the first ``rows`` of a lone linear's input, or ``calls`` of the smallest module around several linears.
    """

    magnitude: Magnitude
    rows: list[torch.Tensor] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)


def transform_block(block: OpenedBlock, plan: Plan) -> Transformed:
    """Apply the plan's transforms to ``block`` and to its stored parameters, in place.

    Scales are chosen on the block as it is, or were learned before, and are folded together.
    """
    done = Transformed()
    for transform in plan.recipe.transforms:
        pairs = find_foldable(block)
        if not isinstance(transform, Awq):
            pairs = [pair for pair in pairs if pair.producer.norm is not None]
        if isinstance(transform, Quadapter):
            assert plan.learned.scales is not None  # learned before the run
            scales = [plan.learned.scales[f"{block.name}.{pair.group.module}"] for pair in pairs]
        else:
            pairs = [pair for pair in pairs if _concerns(pair, plan, block.name)]
            seen, done.outputs = _run(block, pairs, compare=isinstance(transform, Awq))
            scales = [_scale(transform, pair, one, block, plan) for pair, one in zip(pairs, seen, strict=True)]
        for pair, scale in zip(pairs, scales, strict=True):
            # The stored values decide; the block computes with them.
            pair.fold(block.state, scale)
            for name in pair.changed():
                block.module.get_parameter(name).data.copy_(block.state[name])
                done.changed.add(name)
        where = ", ".join(
            f"{pair.producer.name} -> {' '.join(one.name for one in pair.group.linears)}" for pair in pairs
        )
        done.notes.append(f"{transform.name} scales moved: {where or 'nowhere, no place was found for them'}")
    return done


def _concerns(pair: FoldablePair, plan: Plan, prefix: str) -> bool:
    """Whether a linear that is compressed reads the input, and the input's producer is not ignored."""
    made_by = pair.producer.linear
    return bool(_compressed(pair.group, plan, prefix)) and not (
        made_by is not None and plan.recipe.ignores(f"{prefix}.{made_by.name}")
    )


def _compressed(group: InputGroup, plan: Plan, prefix: str) -> list[Linear]:
    return [linear for linear in group.linears if not plan.recipe.ignores(f"{prefix}.{linear.name}")]


def _scale(
    transform: SmoothQuant | Awq, pair: FoldablePair, seen: _Seen, block: OpenedBlock, plan: Plan
) -> torch.Tensor:
    """The scale for the linears that are compressed; the others that read the input are scaled along."""
    linears = _compressed(pair.group, plan, block.name)
    spec = plan.target_of(f"{block.name}.{linears[0].name}").spec
    assert spec is not None  # recipes with transforms quantize
    weights = [linear.view(block.state[linear.parameter]).float() for linear in linears]
    if isinstance(transform, SmoothQuant):
        scale = smoothquant_scale(seen.magnitude.largest, weights, transform.alpha)
    else:
        candidates = awq_candidates(seen.magnitude.mean, weights, transform.steps, transform.duo, spec.group_size)
        scale = best_scale(candidates, _output_loss(linears, weights, block.module, seen, spec))
    # A gain stored as its difference from 1 has few digits near zero, so no gain is made smaller: a common factor of
    # all scales is free (ours).
    return scale / scale.max() if pair.producer.offset else scale


def _output_loss(
    linears: list[Linear], weights: list[torch.Tensor], block: nn.Module, seen: _Seen, spec: GridSpec
) -> Callable[[torch.Tensor], float]:
    """Squared change of the compared outputs when the linears' weights are scaled, rounded and scaled back."""
    if not seen.calls:
        inputs = torch.cat(seen.rows)

        def lone_loss(scale: torch.Tensor) -> float:
            difference = (_rounded(weights[0], scale, spec) - weights[0]).to(inputs.dtype)
            return float(nn.functional.linear(inputs, difference).float().square().sum(dtype=torch.float64))

        return lone_loss
    calls = _shortened(seen.calls)
    expected = [call.output() for call in calls]

    def loss(scale: torch.Tensor) -> float:
        rounded = (_rounded(weight, scale, spec) for weight in weights)
        values = [
            (block.get_parameter(linear.parameter), value.T if linear.transposed else value)
            for linear, value in zip(linears, rounded, strict=True)
        ]
        with swapped(values):
            changes = (call.output() - before for call, before in zip(calls, expected, strict=True))
            return sum(float(change.square_().sum(dtype=torch.float64)) for change in changes)

    return loss


def _shortened(calls: list[ModuleCall]) -> list[ModuleCall]:
    """On as many of the first rows as hold no more counted tokens than are compared; on one row at least."""
    kept: list[ModuleCall] = []
    left = _SEARCH_TOKENS
    for call in calls:
        rows = int((call.mask.sum(1).cumsum(0) <= left).sum())
        if rows or not kept:
            kept.append(call.shortened(max(rows, 1)))
            left -= int(kept[-1].mask.sum())
    return kept


def _rounded(weight: torch.Tensor, scale: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """What rounding makes of ``weight`` on plain ranges of the scaled columns."""
    return rtn(weight * scale, replace(spec, range_search="none")).weight / scale


def _run(block: OpenedBlock, pairs: list[FoldablePair], compare: bool) -> tuple[list[_Seen], list[torch.Tensor]]:
    """Run the block over all batches and note what each pair needs, with ``compare`` also what outputs need.

    Returns the block's outputs too.
    """
    device = block.probe.hidden.device
    seen = [_Seen(Magnitude(pair.group.linears[0].in_features, device)) for pair in pairs]
    left, positions = _SEARCH_TOKENS if compare else 0, _SEARCH_POSITIONS
    outputs = []
    for batch in block.batches:
        hooks: list[tuple[nn.Module, Hook]] = []
        for pair, one in zip(pairs, seen, strict=True):
            alone = len(pair.group.linears) == 1
            first = block.module.get_submodule(pair.group.module)
            hooks.append((first, _note_inputs(one, batch, left if alone else 0)))
            if left > 0 and not alone:
                hooks += _note_calls(block, pair.group, one, batch)
        positions -= batch.mask.numel()
        left = left - int(batch.mask.sum()) if positions > 0 else 0
        with hooked(hooks):
            outputs.append(block.run(batch))
    return seen, outputs


def _note_inputs(seen: _Seen, batch: MicroBatch, kept: int) -> Hook:
    """Note magnitudes, and keep the first ``kept`` counted rows."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])[batch.mask.reshape(-1)]
        seen.magnitude.add(rows)
        if kept > 0:
            seen.rows.append(rows[:kept].clone())

    return note


def _note_calls(block: OpenedBlock, group: InputGroup, seen: _Seen, batch: MicroBatch) -> list[tuple[nn.Module, Hook]]:
    """Keep the calls of the smallest module that contains the whole group."""
    name = common_module([linear.name for linear in group.linears])
    if not name:
        args, kwargs = (batch.hidden, *batch.calls.args[block.index]), batch.calls.kwargs[block.index]
        seen.calls.append(ModuleCall(block.module, args, kwargs, batch.mask))
        return []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.calls.append(ModuleCall(module, args, kwargs, batch.mask))

    return [(block.module.get_submodule(name), note)]
