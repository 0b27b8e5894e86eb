"""Forward passes through a block that wait, each in a greenlet, until a stage of all of them is solved."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import greenlet
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from calibrant.modeling.block_walk import OpenedBlock
from calibrant.modeling.hooks import hooked
from calibrant.modeling.inputs import MicroBatch, call_block
from calibrant.modeling.state_files import StateFiles
from calibrant.modeling.structure import BlockStructure, InputGroup
from calibrant.modeling.suspended_tensors import SuspendedTensors, local_tensors, tensors_of


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

    def release(self) -> None:
        """Release everything."""
        for tensor in (tensor for _, tensor in self._held if id(tensor) not in self._shared):
            tensor.set_()  # type: ignore[call-overload]  # as above
        self._held = []

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


class SuspendedPass:
    """One forward pass of a micro-batch in a greenlet; with a ``file`` its tensors are there while it is suspended."""

    def __init__(
        self, module: nn.Module, index: int, structure: BlockStructure, batch: MicroBatch, file: SuspendedTensors | None
    ) -> None:
        self.batch = batch
        self._structure, self._file = structure, file
        self._memory = _Releasable(structure, batch)
        self._greenlet = greenlet.greenlet(lambda: call_block(module, index, batch))
        self.see(batch.hidden)

    def see(self, values: Any) -> None:
        """Note tensors of this pass."""
        if self._file is not None:
            self._file.see(values)

    def to_stage(self, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Continue to stage ``number`` and return the stage's arguments.

        Raises:
            OrderDiffersError: the pass comes to another stage.
        """
        stage = self._structure.stages[number]
        arrived = self._greenlet.switch()
        if self._greenlet.dead or arrived[0] is not stage:
            raise OrderDiffersError(stage.module, self.intact)
        if isinstance(stage, InputGroup):
            self._memory.reached(number, arrived[1][0])
        return arrived[1], arrived[2]

    def to_end(self) -> torch.Tensor:
        """Continue to the end and return the block's output.

        Raises:
            OrderDiffersError: the pass comes to a stage again.
        """
        output: torch.Tensor = self._greenlet.switch()
        if not self._greenlet.dead:
            raise OrderDiffersError("the first input group again", self.intact)
        return output

    @contextmanager
    def in_memory(self) -> Iterator[None]:
        """Within, its tensors are in memory."""
        if self._file is not None:
            self._file.move_back()
        yield
        if self._file is not None and not self._greenlet.dead:
            self._file.see(local_tensors(self._greenlet.gr_frame))
            self._file.move_out()

    @property
    def intact(self) -> bool:
        """Whether the block's input is still there."""
        return self._file is not None or self._memory.intact

    def release(self) -> None:
        """Give back the input of a pass that has ended, if its output is in a file."""
        if self._file is not None:
            self._memory.release()

    def end(self) -> None:
        """End the pass where it is."""
        if self._file is not None:
            self._file.move_back()
            self._file.forget()
        if self._greenlet and not self._greenlet.dead:
            self._greenlet.throw()


class SuspendedPasses:
    """The suspended passes of all micro-batches through a block, and beside them those of the original block."""

    def __init__(self, block: OpenedBlock, structure: BlockStructure, original: nn.Module | None) -> None:
        self._block, self._structure, self._original = block, structure, original
        self._modules = [block.module] if original is None else [block.module, original]
        self._found: list[tuple[SuspendedPass, SuspendedPass | None]] = []
        self._current: SuspendedPass | None = None

    def __iter__(self) -> Iterator[tuple[SuspendedPass, SuspendedPass | None]]:
        """Every pass with the one beside it; each begins when it is asked for first."""
        for position in range(len(self._block.batches)):
            if position == len(self._found):
                batch = self._block.batches[position]
                run = self._begun(self._block.module, batch, position, "block")
                self._found.append((run, self._twin(batch, position)))
            yield self._found[position]

    def _twin(self, batch: MicroBatch, position: int) -> SuspendedPass | None:
        return None if self._original is None else self._begun(self._original, batch.beside(), position, "original")

    def _begun(self, module: nn.Module, batch: MicroBatch, position: int, name: str) -> SuspendedPass:
        batches, file = self._block.batches, None
        if isinstance(batches, StateFiles):
            given = (batch.calls.args, batch.calls.kwargs, batch.carried, batch.returned, batch.mask)
            shared = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
            file = SuspendedTensors(batches.suspended_file(position, name), [*shared, *tensors_of(self._modules)])
        return SuspendedPass(module, self._block.index, self._structure, batch, file)

    @contextmanager
    def running(self, run: SuspendedPass) -> Iterator[None]:
        """Within, ``run`` continues, with its tensors in memory."""
        with run.in_memory():
            self._current = run
            try:
                yield
            except OrderDiffersError as difference:
                difference.intact = all(one.intact for one, _ in self._found)
                raise
            finally:
                self._current = None

    def watching(self) -> ExitStack:
        """Note what modules are given and return, where passes may move to files."""
        stack = ExitStack()
        if isinstance(self._block.batches, StateFiles):
            parts = [part for module in self._modules for part in module.modules()]
            stack.enter_context(hooked([(part, lambda _, args, kwargs: self._see((args, kwargs))) for part in parts]))
            hooks = [(part, lambda _, args, kwargs, output: self._see(output)) for part in parts]
            stack.enter_context(hooked(hooks, after=True))
        return stack

    def _see(self, values: Any) -> None:
        if self._current is not None:
            self._current.see(values)

    def end(self) -> None:
        """End all passes."""
        for run in (run for pair in self._found for run in pair if run is not None):
            run.end()
