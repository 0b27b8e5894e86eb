"""Running a block on calibration data while its linears are solved.

``sequential_pass`` runs one forward pass per micro-batch, each in a greenlet. A pre-forward hook suspends a pass at
every stage. Once all passes have reached the stage, it is solved, and they continue with the compressed weights.
Where hidden states are in files, so are the tensors of suspended passes, and those of one pass are in memory at a time.
``two_passes`` is the usual loop: collect all statistics, solve; a second pass propagates. All report inputs to a
``Visitor``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import greenlet
import torch
from torch import nn

from calibrant.allocator import return_freed_memory
from calibrant.engine.suspended_passes import SuspendedPass, SuspendedPasses
from calibrant.errors import CalibrantError
from calibrant.modeling.block_walk import OpenedBlock
from calibrant.modeling.hooks import Hook, hooked
from calibrant.modeling.inputs import MicroBatch
from calibrant.modeling.routing import find_routing
from calibrant.modeling.state_files import TensorFiles
from calibrant.modeling.structure import BlockStructure, Experts, ExpertUse, InputGroup, Linear, Stage, watch_experts

Unit = tuple[Linear, ...]


class Visitor(Protocol):
    """Receives the inputs of linears that are solved together, and is told when they are complete.

    Of the products with single experts, it may ask for the inputs that they would have if every token went to them.
    """

    def add(self, unit: Unit, inputs: torch.Tensor, originals: torch.Tensor | None = None) -> None:
        """Add counted input rows ``[tokens, in_features]`` of ``unit``, and the same rows in the original model."""

    def solve(self, unit: Unit) -> None:
        """Solve ``unit``, whose inputs are complete, and replace its weights in the block."""

    def starved(self, group: Unit) -> Unit:
        """The products with single experts whose inputs are to be added again, from all tokens; none by default."""
        return ()


@dataclass(frozen=True)
class _Arrival:
    """The arguments of a stage that a suspended pass has come to."""

    run: SuspendedPass
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def sequential_pass(
    block: OpenedBlock,
    structure: BlockStructure,
    visitor: Visitor,
    original: nn.Module | None = None,
    to_end: bool = True,
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Solve the block's ``structure`` stage by stage during one forward pass per micro-batch.

    Where the batches' states are in files, so are the tensors of suspended passes.

    Args:
        block: the block with its micro-batches.
        structure: the stages to solve.
        visitor: receives the inputs of every stage and solves it.
        original: copy of the block's module with the original weights; it runs on the batches' ``original`` states.
        to_end: whether the compressed block runs on behind the last stage; if not, its outputs are not returned.

    Returns:
        The outputs ``[rows, length, width]`` of the compressed block per batch, and those of ``original``, if given.

    Raises:
        OrderDiffersError: micro-batches reach the stages in different orders. Nothing has been solved out of order, but
            weights may have changed.
    """
    main = greenlet.getcurrent()

    def suspend(stage: Stage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Experts are replayed in the main greenlet, which must not be suspended.
        if greenlet.getcurrent() is not main:
            main.switch((stage, args, kwargs))

    runs = SuspendedPasses(block, structure, original)
    modules = [block.module] if original is None else [block.module, original]
    with runs.watching(), hooked(hook for module in modules for hook in _stage_hooks(module, structure, suspend)):
        try:
            for number, stage in enumerate(structure.stages):
                arrivals: list[_Arrival] = []
                for run, twin in runs:
                    with runs.running(run):
                        args, kwargs = run.to_stage(number)
                        if not isinstance(stage, InputGroup):
                            arrivals.append(_Arrival(run, args, kwargs))
                            continue
                        inputs = _counted(args[0], run.batch.mask, stage)
                        if twin is None:
                            visitor.add(stage.linears, inputs)
                            continue
                        with runs.running(twin):
                            beside, _ = twin.to_stage(number)
                            visitor.add(stage.linears, inputs, _counted(beside[0], run.batch.mask, stage))
                return_freed_memory()
                if isinstance(stage, InputGroup):
                    visitor.solve(stage.linears)
                else:
                    _solve_experts(block.module, stage, arrivals, visitor)
            outputs, originals = block.collector("block"), block.collector("original")
            for run, twin in runs:
                for one, found in ((run if to_end else None, outputs), (twin, originals)):
                    if one is not None:
                        with runs.running(one):
                            found.append(one.to_end())
                            one.release()
            return outputs, originals
        finally:
            runs.end()


def two_passes(block: OpenedBlock, structure: BlockStructure, visitor: Visitor) -> list[torch.Tensor] | TensorFiles:
    """Collect all statistics from the unchanged block and solve it; returns the unchanged block's outputs."""
    outputs = block.collector()
    for batch in block.batches:

        def collect(stage: Stage, args: tuple[Any, ...], kwargs: dict[str, Any], batch: MicroBatch = batch) -> None:
            if isinstance(stage, InputGroup):
                visitor.add(stage.linears, _counted(args[0], batch.mask, stage))
            else:
                parameters = {group[0].parameter for group in stage.groups}
                _replay_experts(block.module, stage, args, kwargs, batch, visitor, parameters)

        with hooked(_stage_hooks(block.module, structure, collect)):
            outputs.append(block.run(batch))
    _collect_starved(block, structure, visitor)
    for stage in structure.stages:
        for unit in _units(stage):
            visitor.solve(unit)
    return outputs


def _collect_starved(block: OpenedBlock, structure: BlockStructure, visitor: Visitor) -> None:
    """Add the inputs of starved experts from all tokens, in another pass."""
    groups = [group for stage in structure.stages if isinstance(stage, Experts) for group in stage.groups]
    starved = {linear for group in groups for linear in visitor.starved(group)}
    for batch in block.batches if starved else ():

        def collect(stage: Stage, args: tuple[Any, ...], kwargs: dict[str, Any], batch: MicroBatch = batch) -> None:
            if isinstance(stage, Experts):
                for linear in (linear for group in stage.groups for linear in group if linear in starved):
                    _replay_expert(block.module, stage, args, kwargs, batch, visitor, linear)

        with hooked(_stage_hooks(block.module, structure, collect)):
            block.run(batch)


def _units(stage: Stage) -> list[Unit]:
    if isinstance(stage, InputGroup):
        return [stage.linears]
    return [(linear,) for group in stage.groups for linear in group]


def _stage_hooks(
    block: nn.Module, structure: BlockStructure, reached: Callable[[Stage, tuple[Any, ...], dict[str, Any]], None]
) -> list[tuple[nn.Module, Hook]]:
    """Hooks that call ``reached`` when the module of a stage is called."""

    def hook_for(stage: Stage) -> Hook:
        return lambda module, args, kwargs: reached(stage, args, kwargs)

    return [(block.get_submodule(stage.module), hook_for(stage)) for stage in structure.stages]


def _counted(inputs: torch.Tensor, mask: torch.Tensor, stage: InputGroup) -> torch.Tensor:
    """Rows ``[tokens, in_features]`` of a stage's input of counted tokens, each of which may have several."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    flat = mask.reshape(-1)
    if bool(flat.all()):
        return rows
    if inputs.shape[:2] == mask.shape:
        return inputs[mask].reshape(-1, inputs.shape[-1])
    if rows.shape[0] != flat.shape[0]:
        raise CalibrantError(
            f"{stage.module}: its input has {rows.shape[0]} rows for {flat.shape[0]} tokens, so the mask cannot be "
            "applied; count every token, or add the layer to the recipe's ignore list"
        )
    return rows[flat]


def _solve_experts(
    block: nn.Module,
    stage: Experts,
    arrivals: list[_Arrival],
    visitor: Visitor,
) -> None:
    """Replay the experts once per product, so that its inputs come from the compressed products before it."""
    for group in stage.groups:
        for one in arrivals:
            with one.run.in_memory():
                _replay_experts(block, stage, one.args, one.kwargs, one.run.batch, visitor, {group[0].parameter})
        for linear in visitor.starved(group):
            for one in arrivals:
                with one.run.in_memory():
                    _replay_expert(block, stage, one.args, one.kwargs, one.run.batch, visitor, linear)
        for linear in group:
            visitor.solve((linear,))


def _replay_experts(
    block: nn.Module,
    stage: Experts,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: MicroBatch,
    visitor: Visitor,
    parameters: set[str],
) -> None:
    """Run the experts on the counted tokens and add the inputs of the products with ``parameters`` to ``visitor``."""
    linears = {(linear.parameter, linear.expert): linear for group in stage.groups for linear in group}

    flat = batch.mask.reshape(-1)

    def seen(use: ExpertUse) -> None:
        inputs = use.inputs
        if use.whole_batch:  # rows of tokens that do not reach the expert are zero
            inputs = inputs[flat] if len(inputs) == len(flat) else inputs
            inputs = inputs[inputs.any(-1)]
        if use.parameter in parameters and inputs.shape[0]:
            visitor.add((linears[use.parameter, use.expert],), inputs)

    with watch_experts(block, seen):
        experts = block.get_submodule(stage.module)
        experts.forward(
            *_counted_rows(args, flat), **dict(zip(kwargs, _counted_rows(tuple(kwargs.values()), flat), strict=True))
        )


def _replay_expert(
    block: nn.Module,
    stage: Experts,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: MicroBatch,
    visitor: Visitor,
    linear: Linear,
) -> None:
    """Send all counted tokens to the expert of ``linear`` and add its inputs to ``visitor``.

    Raises:
        CalibrantError: the experts get no router's choices that could be replaced.
    """
    flat = batch.mask.reshape(-1)
    counted = tuple(_counted_rows(args, flat))
    named = dict(zip(kwargs, _counted_rows(tuple(kwargs.values()), flat), strict=True))
    routing = find_routing((counted, named), len(stage.groups[0]))
    if routing is None or linear.expert is None:
        raise CalibrantError(
            f"{stage.module}: its experts get no router's choices, so tokens cannot be sent to one of them; "
            "leave `experts` out of the recipe"
        )

    def seen(use: ExpertUse) -> None:
        if (use.parameter, use.expert) == (linear.parameter, linear.expert):
            visitor.add((linear,), use.inputs)

    with watch_experts(block, seen):
        sent, sent_named = routing.all_to(linear.expert, (counted, named))
        block.get_submodule(stage.module).forward(*sent, **sent_named)


def _counted_rows(values: tuple[Any, ...], flat: torch.Tensor) -> list[Any]:
    """``values``, with tensors of one row per token cut to counted tokens, which routing treats independently."""
    result = []
    for value in values:
        if isinstance(value, torch.Tensor):
            rows = value.reshape(-1, value.shape[-1]) if value.ndim == 3 else value
            value = rows[flat] if rows.shape[0] == flat.shape[0] else value
        result.append(value)
    return result
