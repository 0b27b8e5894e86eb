"""A block run in float32 with other weights and inputs of its linears, so that gradients reach what they depend on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from calibrant.modeling.hooks import Hook, hooked
from calibrant.modeling.inputs import MicroBatch
from calibrant.modeling.kernel_forward import plain_modules
from calibrant.modeling.module_call import ModuleCall
from calibrant.modeling.structure import Linear

ChangeInput = Callable[[Linear, torch.Tensor], torch.Tensor]


class TrainableBlock:
    """``block`` and its ``linears`` in float32, with the parameters of ``state``; the block itself is not changed.

    ``tensors`` are its parameters and buffers by name. Made and used outside of inference mode; ``trainable`` opens
    one.
    """

    def __init__(self, block: nn.Module, linears: list[Linear], state: Mapping[str, torch.Tensor]) -> None:
        self.linears = linears
        self._block = block
        self.tensors = {name: _wide(state.get(name, tensor)) for name, tensor in _tensors(block)}
        self._change_input: ChangeInput = lambda _, inputs: inputs

    def calls(self, index: int, batches: list[MicroBatch]) -> list[ModuleCall]:
        """The block as it is, number ``index``, on every row of the batches' hidden states."""
        found = []
        for batch in batches:
            args, kwargs = (batch.hidden, *batch.calls.args[index]), batch.calls.kwargs[index]
            args, kwargs = tree_map(_wide, (args, kwargs))
            found += ModuleCall(self._run, args, kwargs, _wide(batch.mask)).split()
        return found

    def changed(self, tensors: dict[str, torch.Tensor], change_input: ChangeInput) -> Callable[..., Any]:
        """The block with these parameters, by name, and changed inputs of its linears."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.watched(change_input):
                return self._run(*args, tensors=tensors, **kwargs)

        return run

    @contextmanager
    def watched(self, watch: ChangeInput) -> Iterator[None]:
        """Meanwhile hand the inputs of linears to ``watch``, and on what it returns."""
        before, self._change_input = self._change_input, watch
        try:
            yield
        finally:
            self._change_input = before

    def _run(self, *args: Any, tensors: dict[str, torch.Tensor] | None = None, **kwargs: Any) -> Any:
        return functional_call(self._block, {**self.tensors, **(tensors or {})}, args, kwargs)

    def hook(self, linear: Linear) -> Hook:
        """A pre-forward hook for the module of ``linear``."""
        return lambda _, args, kwargs: ((self._change_input(linear, args[0]), *args[1:]), kwargs)


@contextmanager
def trainable(block: nn.Module, linears: list[Linear], state: Mapping[str, torch.Tensor]) -> Iterator[TrainableBlock]:
    """``block`` made trainable, inside or outside of inference mode."""
    with torch.inference_mode(False), torch.enable_grad(), plain_modules(block):
        made = TrainableBlock(block, linears, state)
        with hooked((block.get_submodule(linear.name), made.hook(linear)) for linear in linears):
            yield made


def _tensors(block: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from block.named_parameters()
    yield from block.named_buffers()


def _wide(value: Any) -> Any:
    """A copy that gradients may need, floating point numbers as float32; anything but a tensor as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    copy = value.detach().clone()
    return copy.float() if copy.is_floating_point() else copy
