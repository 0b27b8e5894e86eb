"""How the blocks use their linears while a text runs through them, seen on the meta device: nothing is computed."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from calibrant.modeling.find_blocks import text_calls
from calibrant.modeling.hooks import hooked
from calibrant.modeling.inputs import BlockCall
from calibrant.modeling.quietly import quietly


@dataclass(frozen=True)
class LinearUse:
    """Full names of linears of the blocks.

    Attributes:
        uncalled: no text calls them, like the cross-attention of a decoder that runs without an encoder.
        read: something other than their own call reads their weights.
        flat: their inputs are not ``[rows, length, width]``.
    """

    uncalled: frozenset[str]
    read: frozenset[str]
    flat: frozenset[str]


def linear_use(model: transformers.PreTrainedModel, blocks: list[str]) -> LinearUse:
    """How ``blocks`` use their linears.

    Nothing is known of a block that does not run on the meta device (experts chosen by values), and a linear of a list
    inside a block may be an expert that other tokens reach: such linears are not in ``uncalled``.
    """
    uncalled: set[str] = set()
    read: set[str] = set()
    flat: set[str] = set()
    for call in text_calls(model):
        if call.name in blocks:
            watch = _Watch(model.get_submodule(call.name))
            if watch.run(call):
                uncalled |= {f"{call.name}.{name}" for name in watch.linears.keys() - watch.called}
            read |= {f"{call.name}.{name}" for name in watch.read}
            flat |= {f"{call.name}.{name}" for name in watch.flat}
    return LinearUse(
        frozenset(name for name in uncalled if not _listed(name, blocks)), frozenset(read), frozenset(flat)
    )


def _listed(name: str, blocks: list[str]) -> bool:
    """Whether the linear ``name`` is in a list inside its block."""
    block = next(block for block in blocks if name.startswith(f"{block}."))
    return any(part.isdigit() for part in name.removeprefix(f"{block}.").split("."))


class _Watch(TorchFunctionMode):
    """Watches one forward pass of a block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = copy.deepcopy(block).to("meta")
        self.linears = {name: one for name, one in self._block.named_modules() if isinstance(one, nn.Linear)}
        self._name_of = {id(linear.weight): name for name, linear in self.linears.items()}
        self._running: set[str] = set()
        self.called: set[str] = set()
        self.read: set[str] = set()
        self.flat: set[str] = set()

    def run(self, call: BlockCall) -> bool:
        """Run the block as in ``call``; whether it ran to its end."""
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (call.args, call.kwargs))
        before = [(linear, self._entered(name)) for name, linear in self.linears.items()]
        after = [(linear, self._left(name)) for name, linear in self.linears.items()]
        try:
            with hooked(before), hooked(after, after=True), quietly(), torch.no_grad(), self:
                self._block(*args, **kwargs)
        except Exception:  # model code raises anything where it needs values
            return False
        return True

    def _entered(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.called.add(name)
            self._running.add(name)
            if args and args[0].ndim != 3:
                self.flat.add(name)

        return hook

    def _left(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._running.discard(name)

        return hook

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            name = self._name_of.get(id(leaf)) if isinstance(leaf, nn.Parameter) else None
            if name is not None and name not in self._running:
                self.read.add(name)
        return func(*args, **(kwargs or {}))
