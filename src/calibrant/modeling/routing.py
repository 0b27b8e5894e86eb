"""The router's choices among the arguments of fused experts."""

from dataclasses import dataclass
from typing import Any

import torch

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Routing:
    """Where a module of fused experts gets the experts of its tokens.

    Attributes:
        index: experts of every token, int ``[tokens, k]``.
        index_key, weights_key: position or name of the argument, and of the experts' weights.
        dense: the weights have a column for each expert instead of one for each choice.
    """

    index: torch.Tensor
    index_key: int | str
    weights_key: int | str
    dense: bool

    def all_to(self, expert: int, arguments: Arguments) -> Arguments:
        """``arguments`` with which every token goes to ``expert`` alone, with weight 1."""
        args, kwargs = list(arguments[0]), dict(arguments[1])
        weights = _given(arguments, self.weights_key)
        ones = torch.ones_like(weights if self.dense else weights[:, :1])
        for key, value in ((self.index_key, torch.full_like(self.index[:, :1], expert)), (self.weights_key, ones)):
            if isinstance(key, int):
                args[key] = value
            else:
                kwargs[key] = value
        return tuple(args), kwargs


def find_routing(arguments: Arguments, experts: int) -> Routing | None:
    """The routing in the ``arguments`` of a module of ``experts`` fused experts; None if they are not routed so.

    The first argument is the hidden states.
    """
    places: list[tuple[int | str, Any]] = [*enumerate(arguments[0]), *arguments[1].items()]
    matrices = [(key, one) for key, one in places[1:] if isinstance(one, torch.Tensor) and one.ndim == 2]
    found = [(key, one) for key, one in matrices if one.dtype in (torch.int64, torch.int32)]
    if len(found) != 1:
        return None
    index_key, index = found[0]
    for key, one in matrices:
        if one.is_floating_point() and len(one) == len(index) and one.shape[1] in (index.shape[1], experts):
            return Routing(index, index_key, key, one.shape[1] != index.shape[1])
    return None


def _given(arguments: Arguments, key: int | str) -> torch.Tensor:
    found: torch.Tensor = arguments[0][key] if isinstance(key, int) else arguments[1][key]
    return found
