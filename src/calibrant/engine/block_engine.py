"""Running a block on calibration data while its linears are solved.

``sequential_pass`` runs one forward pass per micro-batch, each in a greenlet. A pre-forward hook suspends a pass at
every stage. Once all passes have reached the stage, it is solved, and they continue with the compressed weights.
``repeated_passes`` gives the same result with one micro-batch in memory: each stage runs the block again up to there.
``two_passes`` is the usual loop: collect all statistics, solve; a second pass propagates. All report inputs to a
``Visitor``.
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


class _Releasable:
    """Tensors of one suspended forward pass whose memory is released before Python frees them.

    The frames of the forward pass keep references to the block's input and to every group's input until they return,
    long after the last use.
    """

    def __init__(self, structure: BlockStructure, batch: MicroBatch) -> None:
        self._structure, self._batch = structure, batch
        # Blocks and batches share the arguments other than the hidden states.
        self._shared = {id(leaf) for leaf in tree_leaves((batch.calls.args, batch.calls.kwargs))}
        self._held: list[tuple[int, torch.Tensor]] = [(structure.hidden_last_use, batch.hidden)]

    def reached(self, number: int, inputs: torch.Tensor) -> None:
        """Release tensors whose last use was before stage ``number``, which has been reached with ``inputs``."""
        for _, tensor in [held for held in self._held if held[0] <= number and id(held[1]) not in self._shared]:
            tensor.set_()  # type: ignore[call-overload]  # an empty tensor turns a later use into an error, not a wrong result
        self._held = [held for held in self._held if held[0] > number]
        self._held.append((self._structure.last_use[number], inputs))

    @property
    def intact(self) -> bool:
        """Whether the block's input is still in memory."""
        return self._batch.hidden.numel() > 0


class OrderDiffersError(Exception):
    """Micro-batches reach the stages in different orders, so that one suspended pass cannot solve the block.

    ``intact``: whether the block's inputs are still in memory, so that two passes can solve it instead.
    """

    def __init__(self, where: str, intact: bool) -> None:
        super().__init__(where)
        self.intact = intact


def sequential_pass(
    block: OpenedBlock, structure: BlockStructure, visitor: Visitor, original: nn.Module | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Solve the block's ``structure`` stage by stage during one forward pass per micro-batch.

    Args:
        block: the block with its micro-batches.
        structure: the stages to solve.
        visitor: receives the inputs of every stage and solves it.
        original: copy of the block's module with the original weights; it runs on the batches' ``original`` states.

    Returns:
        The outputs ``[rows, length, width]`` of the compressed block per batch, and those of ``original``, if given.

    Raises:
        OrderDiffersError: micro-batches reach the stages in different orders. Nothing has been solved out of order, but
            weights may have changed.
    """
    batches = list(block.batches)
    main = greenlet.getcurrent()

    def suspend(stage: Stage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Experts are replayed in the main greenlet, which must not be suspended.
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
        """Continue ``run`` to stage ``number`` and return the stage's arguments."""
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
                raise OrderDiffersError("the first input group again", all(tensors.intact for tensors in memory))
            return outputs, originals_after
        finally:
            for run in (*runs, *twins):
                if run and not run.dead:
                    run.throw()


class _StageReachedError(Exception):
    """Ends a forward pass at the stage whose arguments are wanted."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.given = args, kwargs


def repeated_passes(
    block: OpenedBlock, structure: BlockStructure, visitor: Visitor, original: nn.Module | None = None
) -> None:
    """Solve the block's ``structure`` as ``sequential_pass`` does, with one micro-batch in memory at a time.

    Every stage runs each micro-batch from the block's beginning, through the compressed groups before the stage, up to
    the stage. The arguments are those of ``sequential_pass``; the caller advances the batches.

    Raises:
        OrderDiffersError: micro-batches reach the stages in different orders. Nothing has been solved out of order, but
            weights may have changed.
    """
    for number, stage in enumerate(structure.stages):
        if not isinstance(stage, InputGroup):
            for group in stage.groups:
                for batch in block.batches:
                    args, kwargs = _run_up_to(block.module, block.index, structure, number, batch)
                    _replay_experts(block.module, stage, args, kwargs, batch, visitor, {group[0].parameter})
                for linear in visitor.starved(group):
                    for batch in block.batches:
                        args, kwargs = _run_up_to(block.module, block.index, structure, number, batch)
                        _replay_expert(block.module, stage, args, kwargs, batch, visitor, linear)
                for linear in group:
                    visitor.solve((linear,))
            continue
        for batch in block.batches:
            args, _ = _run_up_to(block.module, block.index, structure, number, batch)
            originals = None
            if original is not None:
                beside, _ = _run_up_to(original, block.index, structure, number, batch.beside())
                originals = _counted(beside[0], batch.mask, stage)
            visitor.add(stage.linears, _counted(args[0], batch.mask, stage), originals)
        return_freed_memory()
        visitor.solve(stage.linears)


def _run_up_to(
    module: nn.Module, index: int, structure: BlockStructure, number: int, batch: MicroBatch
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of stage ``number`` of block ``index``, which runs on ``batch``."""
    expected = iter(structure.stages[: number + 1])

    def reached(stage: Stage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if next(expected) is not stage:
            raise OrderDiffersError(stage.module, intact=True)
        if stage is structure.stages[number]:
            raise _StageReachedError(args, kwargs)

    with hooked(_stage_hooks(module, structure, reached)):
        try:
            call_block(module, index, batch)
        except _StageReachedError as end:
            return end.given
    raise OrderDiffersError(structure.stages[number].module, intact=True)


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
    arrivals: list[tuple[tuple[Any, ...], dict[str, Any]]],
    batches: list[MicroBatch],
    visitor: Visitor,
) -> None:
    """Replay the experts once per product, so that its inputs come from the compressed products before it."""
    for group in stage.groups:
        for (args, kwargs), batch in zip(arrivals, batches, strict=True):
            _replay_experts(block, stage, args, kwargs, batch, visitor, {group[0].parameter})
        for linear in visitor.starved(group):
            for (args, kwargs), batch in zip(arrivals, batches, strict=True):
                _replay_expert(block, stage, args, kwargs, batch, visitor, linear)
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
