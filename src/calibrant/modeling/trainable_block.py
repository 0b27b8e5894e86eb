"""A block run in float32 with replaced weights and linear inputs, through which gradients flow."""

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
    """``block`` in float32 with the parameters of ``state``; the block itself is not changed.

    ``tensors`` contains the parameters and buffers by name. Must be created and used outside inference mode, as
    ``trainable`` does.
    """

    def __init__(self, block: nn.Module, linears: list[Linear], state: Mapping[str, torch.Tensor]) -> None:
        self.linears = linears
        self._block = block
        self.tensors = {name: _wide(state.get(name, tensor)) for name, tensor in _tensors(block)}
        self._change_input: ChangeInput = lambda _, inputs: inputs

    def calls(self, index: int, batches: list[MicroBatch]) -> list[ModuleCall]:
        """Calls of the unchanged block, number ``index``, one per row of the batches' hidden states."""
        return [call for batch in batches for call in self.call(index, batch).split()]

    def call(self, index: int, batch: MicroBatch) -> ModuleCall:
        """The call of the unchanged block, number ``index``, on the hidden states of ``batch``."""
        args, kwargs = (batch.hidden, *batch.calls.args[index]), batch.calls.kwargs[index]
        args, kwargs = tree_map(_wide, (args, kwargs))
        return ModuleCall(self._run, args, kwargs, _wide(batch.mask))

    def changed(self, tensors: dict[str, torch.Tensor], change_input: ChangeInput) -> Callable[..., Any]:
        """The block as a function, with parameters replaced by ``tensors`` and linears' inputs by ``change_input``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.watched(change_input):
                return self._run(*args, tensors=tensors, **kwargs)

        return run

    @contextmanager
    def watched(self, watch: ChangeInput) -> Iterator[None]:
        """Within the context, replace the inputs of linears with the values ``watch`` returns for them."""
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
    """Open a ``TrainableBlock``, also from within inference mode."""
    with torch.inference_mode(False), torch.enable_grad(), plain_modules(block):
        made = TrainableBlock(block, linears, state)
        with hooked((block.get_submodule(linear.name), made.hook(linear)) for linear in linears):
            yield made


def _tensors(block: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from block.named_parameters()
    yield from block.named_buffers()


def _wide(value: Any) -> Any:
    """Copy a tensor so that autograd can save it, floating-point tensors as float32; return other values unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    copy = value.detach().clone()
    return copy.float() if copy.is_floating_point() else copy
