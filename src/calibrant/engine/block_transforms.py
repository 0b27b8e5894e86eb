"""Transforms of a block before it is solved: measure its inputs, choose scales, fold them into the weights."""

from collections.abc import Callable, Sequence
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
from calibrant.ranks import ALONE, Ranks
from calibrant.recipes.parts import Awq, Quadapter, SmoothQuant
from calibrant.recipes.plan import Plan

# AWQ compares outputs on this many counted tokens, or on one micro-batch if a module cannot run on part of it (ours;
# the code of arXiv 2306.00978 uses its whole set of 65,536 tokens).
_SEARCH_TOKENS = 1024
# AWQ searches at most this many positions for counted tokens (ours).
_SEARCH_POSITIONS = 4096


@dataclass
class Transformed:
    """Result of a block's transforms.

    Attributes:
        changed: names of the parameters that changed.
        outputs: the block's output per batch before the last transform that measures inputs.
        notes: one sentence per transform, for the user.
    """

    changed: set[str] = field(default_factory=set)
    outputs: Sequence[torch.Tensor] = ()
    notes: list[str] = field(default_factory=list)


@dataclass
class _Seen:
    """Statistics of one pair from a pass over the calibration data, and inputs on which AWQ compares outputs.

    The inputs are the first ``rows`` of a single linear's input, or ``calls`` of the innermost module that contains all
    linears of the group.
    """

    magnitude: Magnitude
    rows: list[torch.Tensor] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)


def transform_block(block: OpenedBlock, plan: Plan, ranks: Ranks = ALONE) -> Transformed:
    """Apply the plan's transforms to the module and the stored parameters of ``block``, in place.

    Each of ``ranks`` measures inputs of its own; outputs are compared on those of the first.

    All scales of a transform are chosen on the block as the previous transform left it, or taken from the plan if they
    were learned; then all are folded.
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
            for one in seen:
                one.magnitude.tokens = sum(ranks.collect(one.magnitude.tokens))
                ranks.largest(one.magnitude.largest)
                for tensor in one.magnitude.sums:
                    ranks.add_up(tensor)
            scales = []
            if ranks.first:
                scales = [_scale(transform, pair, one, block, plan) for pair, one in zip(pairs, seen, strict=True)]
            scales = ranks.share(scales)
        for pair, scale in zip(pairs, scales, strict=True):
            # Fold the stored values, then copy them, so that the block computes with the rounding of the stored dtype.
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
    """Whether the recipe compresses a linear of the group and does not ignore the producer."""
    made_by = pair.producer.linear
    return bool(_compressed(pair.group, plan, prefix)) and not (
        made_by is not None and plan.leaves(f"{prefix}.{made_by.name}")
    )


def _compressed(group: InputGroup, plan: Plan, prefix: str) -> list[Linear]:
    return [linear for linear in group.linears if not plan.leaves(f"{prefix}.{linear.name}")]


def _scale(
    transform: SmoothQuant | Awq, pair: FoldablePair, seen: _Seen, block: OpenedBlock, plan: Plan
) -> torch.Tensor:
    """Scale ``[in]`` of a pair, chosen for the compressed linears; the fold scales the group's other linears too."""
    linears = _compressed(pair.group, plan, block.name)
    spec = plan.target_of(f"{block.name}.{linears[0].name}").spec
    assert spec is not None  # recipes with transforms quantize
    weights = [linear.view(block.state[linear.parameter]).float() for linear in linears]
    if isinstance(transform, SmoothQuant):
        scale = smoothquant_scale(seen.magnitude.largest, weights, transform.alpha)
    else:
        candidates = awq_candidates(seen.magnitude.mean, weights, transform.steps, transform.duo, spec.group_size)
        scale = best_scale(candidates, _output_loss(linears, weights, block.module, seen, spec))
    # A gain stored as its difference from 1 loses precision near zero, so no gain is reduced; a common factor of all
    # scales does not matter (ours).
    return scale / scale.max() if pair.producer.offset else scale


def _output_loss(
    linears: list[Linear], weights: list[torch.Tensor], block: nn.Module, seen: _Seen, spec: GridSpec
) -> Callable[[torch.Tensor], float]:
    """Loss of a scale: squared change of the outputs when the weights are scaled, rounded and scaled back."""
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
    """The calls on their first rows, up to ``_SEARCH_TOKENS`` counted tokens in total; at least one row."""
    kept: list[ModuleCall] = []
    left = _SEARCH_TOKENS
    for call in calls:
        rows = int((call.mask.sum(1).cumsum(0) <= left).sum())
        if rows or not kept:
            kept.append(call.shortened(max(rows, 1)))
            left -= int(kept[-1].mask.sum())
    return kept


def _rounded(weight: torch.Tensor, scale: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """``weight`` after scaling its columns, rounding to nearest without range search, and scaling back."""
    return rtn(weight * scale, replace(spec, range_search="none")).weight / scale


def _run(block: OpenedBlock, pairs: list[FoldablePair], compare: bool) -> tuple[list[_Seen], Sequence[torch.Tensor]]:
    """Run the block on all batches; returns the statistics of every pair and the block's outputs.

    ``compare`` also keeps the inputs on which outputs are compared.
    """
    device = block.probe.hidden.device
    seen = [_Seen(Magnitude(pair.group.linears[0].in_features, device)) for pair in pairs]
    left, positions = _SEARCH_TOKENS if compare else 0, _SEARCH_POSITIONS
    outputs = block.collector()
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
    """Hook that adds input magnitudes to ``seen`` and keeps the first ``kept`` counted rows."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])[batch.mask.reshape(-1)]
        seen.magnitude.add(rows)
        if kept > 0:
            seen.rows.append(rows[:kept].clone())

    return note


def _note_calls(block: OpenedBlock, group: InputGroup, seen: _Seen, batch: MicroBatch) -> list[tuple[nn.Module, Hook]]:
    """Record the call of the innermost module that contains the group: at once for the block itself, else by a hook."""
    name = common_module([linear.name for linear in group.linears])
    if not name:
        args, kwargs = (batch.hidden, *batch.calls.args[block.index]), batch.calls.kwargs[block.index]
        seen.calls.append(ModuleCall(block.module, args, kwargs, batch.mask))
        return []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.calls.append(ModuleCall(module, args, kwargs, batch.mask))

    return [(block.module.get_submodule(name), note)]
