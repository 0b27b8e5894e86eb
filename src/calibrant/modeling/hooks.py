"""Context managers that change a model for a while: hooks on modules, other modules, other values in parameters."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

Hook = Callable[..., Any]


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Hook]], *, after: bool = False, first: bool = False) -> Iterator[None]:
    """Call each hook before its module's forward pass, or ``after`` it, until the context ends.

    With ``first`` it is called before the hooks that the module has already.

    A hook is called as ``hook(module, args, kwargs)`` and may return changed ``(args, kwargs)``; with ``after`` as
    ``hook(module, args, kwargs, output)``, and may return another output.
    """
    with ExitStack() as stack:
        for module, hook in hooks:
            register = module.register_forward_hook if after else module.register_forward_pre_hook
            stack.callback(register(hook, with_kwargs=True, prepend=first).remove)
        yield


@contextmanager
def swapped(values: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Give each tensor (a parameter, say) the value beside it, of any shape, until the context ends.

    Values are cast to the tensor's dtype. Afterwards every tensor has its old storage back, bit for bit.
    """
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for tensor, value in values:
            kept.append((tensor, tensor.data))
            tensor.data = value.detach().to(tensor.dtype).contiguous()
        yield
    finally:
        for tensor, data in reversed(kept):
            tensor.data = data


@contextmanager
def replaced(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
    """Put ``modules`` in the places of the submodules of ``model`` with these names, until the context ends."""
    originals = {name: model.get_submodule(name) for name in modules}
    try:
        _place(model, modules)
        yield
    finally:
        _place(model, originals)


def _place(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
