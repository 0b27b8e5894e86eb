"""The feed-forward part of every block, found by what it computes: each position's output from that position alone."""

import itertools
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from calibrant.errors import CalibrantError
from calibrant.modeling.find_blocks import find_blocks
from calibrant.modeling.hooks import hooked
from calibrant.modeling.structure import fused_parameters

_TOKENS = 8
_Call = tuple[tuple[Any, ...], dict[str, Any], torch.Tensor | None]


@torch.inference_mode()
def find_feed_forward(model: transformers.PreTrainedModel) -> list[tuple[str, ...]]:
    """For every block that has a feed-forward part, the modules whose outputs' sum is that part's output.

    Such a module takes hidden states, gives hidden states of the same shape, holds two linears or experts, and gives
    the same at all other positions if one is changed; of nested ones the outermost counts (an MLP; router and experts;
    two MLPs side by side). In a block without such a module it is the linear behind another one, if what the second
    reads depends on the first one's output position by position (OPT, BLOOM, BERT). ``model`` is loaded completely.

    Raises:
        CalibrantError: no block has a feed-forward part.
    """
    blocks = find_blocks(model)
    tokens = torch.arange(_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size
    calls: dict[str, _Call] = {}

    def noted(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            whole = first_tensor(output)
            # Copied, because blocks add to it in place (Falcon).
            calls.setdefault(name, (args, kwargs, None if whole is None else whole.clone()))

        return hook

    inside = [f"{block}.{name}" if name else block for block in blocks for name, _ in _at(model, block).named_modules()]
    with hooked(((model.get_submodule(name), noted(name)) for name in inside), after=True):
        model.base_model(input_ids=tokens, use_cache=False)
    found = [_parts_of(model, block, calls) for block in blocks]
    if not any(found):
        raise CalibrantError(
            f"{type(model).__name__}: its blocks have no feed-forward part that works position by position"
        )
    return [parts for parts in found if parts]


def _parts_of(model: nn.Module, block: str, calls: dict[str, _Call]) -> tuple[str, ...]:
    parts: list[str] = []
    for name, module in _at(model, block).named_modules():
        full = f"{block}.{name}"
        inside_another = any(full.startswith(f"{part}.") for part in parts)
        if (
            name
            and full in calls
            and not inside_another
            and _is_large(module)
            and _is_feed_forward(module, calls[full])
        ):
            parts.append(full)
    return tuple(parts) or _second_linear(model, block, calls)


def _is_large(module: nn.Module) -> bool:
    linears = sum(isinstance(one, nn.Linear | Conv1D) for one in module.modules())
    return linears > 1 or bool(fused_parameters(module))


def _is_feed_forward(module: nn.Module, call: _Call) -> bool:
    args, kwargs, whole = call
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if len(tensors) != 1 or whole is None or whole.shape != tensors[0].shape:
        return False
    changed = _first_changed(tensors[0])
    try:
        found = first_tensor(module(*_put(args, tensors[0], changed), **_put(kwargs, tensors[0], changed)))
    except (RuntimeError, TypeError, ValueError):  # it cannot be called again alone
        return False
    return found is not None and _same_behind_the_first(found, whole, routed=bool(fused_parameters(module)))


def _second_linear(model: nn.Module, block: str, calls: dict[str, _Call]) -> tuple[str, ...]:
    """The last linear that reads, position by position, what another one gives; () if there is none."""
    linears = [
        name for name in calls if name.startswith(f"{block}.") and isinstance(_at(model, name), nn.Linear | Conv1D)
    ]
    for first, second in [*itertools.pairwise(linears)][::-1]:
        read, inner, given, hidden = calls[second][0][0], calls[first][2], calls[second][2], calls[block][2]
        assert inner is not None
        assert given is not None
        assert hidden is not None
        fits = read.shape[-1] == inner.shape[-1] and given.shape[-1] == hidden.shape[-1]
        if fits and _reads_by_position(model, block, first, second, calls):
            return (second,)
    return ()


def _reads_by_position(model: nn.Module, block: str, first: str, second: str, calls: dict[str, _Call]) -> bool:
    seen: list[torch.Tensor] = []

    def change(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        return _first_changed(output)

    def read(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        seen.append(args[0])

    args, kwargs, _ = calls[block]
    with hooked([(_at(model, first), change), (_at(model, second), read)], after=True):
        _at(model, block)(*args, **kwargs)
    before = calls[second][0][0]
    return not torch.equal(seen[0], before) and _same_behind_the_first(seen[0], before)


def _at(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def first_tensor(output: Any) -> torch.Tensor | None:
    """A module's output, or the first value of a tuple that it returns; None if that is no tensor."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, torch.Tensor) else None


def _first_changed(hidden: torch.Tensor) -> torch.Tensor:
    """``hidden`` ``[.., positions, width]`` with other values at the first position."""
    changed = hidden.clone()
    changed[..., 0, :] = 1 - 2 * hidden[..., -1, :]
    return changed


def _put(arguments: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    if isinstance(arguments, dict):
        return {name: new if value is old else value for name, value in arguments.items()}
    return tuple(new if value is old else value for value in arguments)


def _same_behind_the_first(found: torch.Tensor, wanted: torch.Tensor, routed: bool = False) -> bool:
    found, wanted = found[..., 1:, :], wanted[..., 1:, :]
    # Experts that get other numbers of rows round their products differently.
    tolerance = 1e-2 if routed and wanted.dtype is not torch.float32 else 1e-5
    return bool((found - wanted).float().norm() <= tolerance * wanted.float().norm())
