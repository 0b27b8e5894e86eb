"""Running a block on calibration data while its linears are solved.

``sequential_pass`` runs every micro-batch's forward once: it is suspended where it reaches an input group (a
greenlet, switched away in a pre-forward hook); when all have arrived, the group is solved; then all go on with the
compressed weights. ``two_passes`` is the usual collect-then-propagate loop. Both tell a ``Visitor`` what they see.
"""

from collections.abc import Callable
from typing import Any, Protocol

import greenlet
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from calibrant.allocator import return_freed_memory
from calibrant.errors import CalibrantError
from calibrant.modeling.block_walk import OpenedBlock
from calibrant.modeling.hooks import Hook, hooked
from calibrant.modeling.inputs import MicroBatch, call_block
from calibrant.modeling.structure import BlockStructure, Experts, ExpertUse, InputGroup, Linear, Stage, watch_experts

Unit = tuple[Linear, ...]


class Visitor(Protocol):
    """Receives the inputs of linears solved together, and the moment when all are in."""

    def add(self, unit: Unit, inputs: torch.Tensor, originals: torch.Tensor | None = None) -> None:
        """Counted input rows ``[tokens, in_features]`` of ``unit``, and what the original model has in their place."""

    def solve(self, unit: Unit) -> None:
        """All inputs have been added: replace the weights in the block."""


class _Releasable:
    """Tensors of one suspended forward whose memory can be given back before Python drops them.

    The callers' frames hold a block's input and each group's input until they return, long after their last use.
    """

    def __init__(self, structure: BlockStructure, batch: MicroBatch) -> None:
        self._structure, self._batch = structure, batch
        # What blocks are called with besides the hidden states is shared by blocks and batches.
        self._shared = {id(leaf) for leaf in tree_leaves((batch.calls.args, batch.calls.kwargs))}
        self._held: list[tuple[int, torch.Tensor]] = [(structure.hidden_last_use, batch.hidden)]

    def reached(self, number: int, inputs: torch.Tensor) -> None:
        """Stage ``number`` was reached with ``inputs``: free what was last used before it."""
        for _, tensor in [held for held in self._held if held[0] <= number and id(held[1]) not in self._shared]:
            tensor.set_()  # type: ignore[call-overload]  # now empty: a use after all would be an error, not a wrong result
        self._held = [held for held in self._held if held[0] > number]
        self._held.append((self._structure.last_use[number], inputs))

    @property
    def intact(self) -> bool:
        """Whether the block's input is still there."""
        return self._batch.hidden.numel() > 0


class OrderDiffersError(Exception):
    """Two micro-batches reach the stages in different orders, so one suspended pass cannot serve them.

    ``intact``: the block's inputs are still in memory, so that the block can be solved again in two passes.
    """

    def __init__(self, where: str, intact: bool) -> None:
        super().__init__(where)
        self.intact = intact


def sequential_pass(
    block: OpenedBlock, structure: BlockStructure, visitor: Visitor, original: nn.Module | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Solve the block's ``structure`` stage by stage in one forward pass; returns the compressed block's outputs.

    ``original``, a copy of the block's module, runs beside it on the batches' ``original`` states; its outputs come
    second.

    Raises:
        OrderDiffersError: micro-batches reach the stages in different orders. Nothing was solved out of order, but
            weights may have changed already; ``intact`` says whether the block's inputs are still there.
    """
    batches = block.batches
    main = greenlet.getcurrent()

    def suspend(stage: Stage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Replays of experts run in the main greenlet and must not suspend it.
        if greenlet.getcurrent() is not main:
            main.switch((stage, args, kwargs))

    beside = [batch.beside() for batch in batches] if original is not None else []
    modules = [block.module] if original is None else [block.module, original]

    def started(module: nn.Module, rows: list[MicroBatch]) -> list[Any]:
        return [greenlet.greenlet(lambda batch=batch: call_block(module, block.index, batch)) for batch in rows]

    runs, twins = started(block.module, batches), started(modules[-1], beside)
    memory = [_Releasable(structure, batch) for batch in batches]
    twin_memory = [_Releasable(structure, batch) for batch in beside]

    def advance(run: Any, number: int, tensors: _Releasable) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Run on to stage ``number``; returns its arguments."""
        stage = structure.stages[number]
        arrived = run.switch()
        if run.dead or arrived[0] is not stage:
            raise OrderDiffersError(stage.module, all(tensors.intact for tensors in memory))
        if isinstance(stage, InputGroup):
            tensors.reached(number, arrived[1][0])
        return arrived[1], arrived[2]

    with hooked(hook for module in modules for hook in _stage_hooks(module, structure, suspend)):
        try:
            for number, stage in enumerate(structure.stages):
                arrivals = []
                for position, batch in enumerate(batches):
                    args, kwargs = advance(runs[position], number, memory[position])
                    if not isinstance(stage, InputGroup):
                        arrivals.append((args, kwargs))
                        continue
                    originals = None
                    if twins:
                        twin_args, _ = advance(twins[position], number, twin_memory[position])
                        originals = _counted(twin_args[0], batch.mask, stage)
                    visitor.add(stage.linears, _counted(args[0], batch.mask, stage), originals)
                return_freed_memory()
                if isinstance(stage, InputGroup):
                    visitor.solve(stage.linears)
                else:
                    _solve_experts(block.module, stage, arrivals, batches, visitor)
            outputs, originals_after = [run.switch() for run in runs], [run.switch() for run in twins]
            if not all(run.dead for run in (*runs, *twins)):
                raise OrderDiffersError("an input group twice", all(tensors.intact for tensors in memory))
            return outputs, originals_after
        finally:
            for run in (*runs, *twins):
                if run and not run.dead:
                    run.throw()


def two_passes(block: OpenedBlock, structure: BlockStructure, visitor: Visitor, propagate: bool) -> list[torch.Tensor]:
    """Collect every statistic from the original block, solve everything, then run the compressed block.

    Without ``propagate`` the next block is fed the original block's outputs and the second run is saved.
    """
    outputs = []
    for batch in block.batches:

        def collect(stage: Stage, args: tuple[Any, ...], kwargs: dict[str, Any], batch: MicroBatch = batch) -> None:
            if isinstance(stage, InputGroup):
                visitor.add(stage.linears, _counted(args[0], batch.mask, stage))
            else:
                parameters = {group[0].parameter for group in stage.groups}
                _replay_experts(block.module, stage, args, kwargs, batch, visitor, parameters)

        with hooked(_stage_hooks(block.module, structure, collect)):
            outputs.append(block.run(batch))
    for stage in structure.stages:
        for unit in _units(stage):
            visitor.solve(unit)
    return [block.run(batch) for batch in block.batches] if propagate else outputs


def _units(stage: Stage) -> list[Unit]:
    if isinstance(stage, InputGroup):
        return [stage.linears]
    return [(linear,) for group in stage.groups for linear in group]


def _stage_hooks(
    block: nn.Module, structure: BlockStructure, reached: Callable[[Stage, tuple[Any, ...], dict[str, Any]], None]
) -> list[tuple[nn.Module, Hook]]:
    """Hooks that call ``reached`` with each stage when its module is called."""

    def hook_for(stage: Stage) -> Hook:
        return lambda module, args, kwargs: reached(stage, args, kwargs)

    return [(block.get_submodule(stage.module), hook_for(stage)) for stage in structure.stages]


def _counted(inputs: torch.Tensor, mask: torch.Tensor, stage: InputGroup) -> torch.Tensor:
    """The rows of a linear's input that belong to counted tokens."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    flat = mask.reshape(-1)
    if rows.shape[0] != flat.shape[0]:
        raise CalibrantError(
            f"{stage.module}: its input has {rows.shape[0]} rows for {flat.shape[0]} tokens, so the mask cannot be "
            "applied; add the layer to the recipe's ignore list"
        )
    return rows if bool(flat.all()) else rows[flat]


def _solve_experts(
    block: nn.Module,
    stage: Experts,
    arrivals: list[tuple[tuple[Any, ...], dict[str, Any]]],
    batches: list[MicroBatch],
    visitor: Visitor,
) -> None:
    """One replay of the experts for each of their products, so that each sees inputs from compressed earlier ones."""
    for group in stage.groups:
        for (args, kwargs), batch in zip(arrivals, batches, strict=True):
            _replay_experts(block, stage, args, kwargs, batch, visitor, {group[0].parameter})
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
    """Run the experts on counted tokens only and report the inputs of the products with ``parameters``."""
    linears = {(linear.parameter, linear.expert): linear for group in stage.groups for linear in group}

    def seen(use: ExpertUse) -> None:
        if use.parameter in parameters and use.inputs.shape[0]:
            visitor.add((linears[use.parameter, use.expert],), use.inputs)

    flat = batch.mask.reshape(-1)
    with watch_experts(block, seen):
        experts = block.get_submodule(stage.module)
        experts.forward(
            *_counted_rows(args, flat), **dict(zip(kwargs, _counted_rows(tuple(kwargs.values()), flat), strict=True))
        )


def _counted_rows(values: tuple[Any, ...], flat: torch.Tensor) -> list[Any]:
    """Tensors with a row a token, cut down to the counted tokens (routing treats every token alone)."""
    result = []
    for value in values:
        if isinstance(value, torch.Tensor):
            rows = value.reshape(-1, value.shape[-1]) if value.ndim == 3 else value
            value = rows[flat] if rows.shape[0] == flat.shape[0] else value
        result.append(value)
    return result
