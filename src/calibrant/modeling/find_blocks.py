"""The blocks of a model: the modules that a text runs through one after the other, found by running one.

A few tokens run through the model with every possible block replaced by a recorder, and everything else filled with
placeholder values where its weights are not loaded. So no weight is read, a vision tower is never taken for the model,
and a list may contain blocks of several classes.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from calibrant.errors import CalibrantError, first_line
from calibrant.modeling.hooks import replaced
from calibrant.modeling.inputs import RETURNED_VALUES, BlockCall, Recorder, changed_between, not_one_at_a_time
from calibrant.modeling.quietly import quietly

_TOKENS = 8


def find_blocks(model: transformers.PreTrainedModel) -> list[str]:
    """Names of the blocks, in the order in which a text runs through them.

    Of several stacks of blocks the one with the most parameters is chosen (ours); ``blocks_beside`` names the others.

    Raises:
        CalibrantError: the model has no blocks, or none that can be run one at a time and once each.
    """
    calls = text_calls(model)
    times = Counter(call.name for call in calls)
    stacks: dict[str, list[BlockCall]] = {}
    for call in calls:
        stacks.setdefault(_list_of(call.name), []).append(call)
    if not stacks:
        raise CalibrantError(
            f"{type(model).__name__}: no list of blocks that a text runs through, so it cannot be compressed"
        )
    once = [stack for stack in stacks.values() if all(times[call.name] == 1 for call in stack)]
    if not once:
        name, count = times.most_common(1)[0]
        raise not_one_at_a_time(model, f"{name} runs {count} times in a forward pass")
    best = max(once, key=lambda stack: sum(_parameters(model, call.name) for call in stack))
    blocks = [call.name for call in best]
    first = next(index for index, call in enumerate(calls) if call.name == blocks[0])
    between = next((call.name for call in calls[first : first + len(blocks)] if call.name not in blocks), None)
    wrong = f"{between} runs between them" if between is not None else changed_between(best)
    wrong = wrong or _shared(model, blocks)
    if wrong is not None:
        raise not_one_at_a_time(model, wrong)
    return blocks


def blocks_beside(model: transformers.PreTrainedModel, blocks: list[str]) -> list[str]:
    """Names of the blocks that a text runs through besides ``blocks``.

    Raises:
        CalibrantError: as for ``find_blocks``.
    """
    return list(dict.fromkeys(call.name for call in text_calls(model) if call.name not in blocks))


def text_calls(model: transformers.PreTrainedModel) -> list[BlockCall]:
    """The calls of possible blocks in a forward pass of a text, in order.

    Raises:
        CalibrantError: the model does not run without its blocks.
    """
    candidates = _candidates(model)
    found: list[list[BlockCall]] = []
    problem = ""
    for values in RETURNED_VALUES:
        calls: list[BlockCall] = []
        recorders: dict[str, nn.Module] = {
            name: Recorder(name, module, calls, values) for name, module in candidates.items()
        }
        with replaced(model, recorders), _filled(model), quietly(), torch.no_grad():
            tokens = torch.arange(_TOKENS, device=_device(model))[None] % model.config.get_text_config().vocab_size
            try:
                model.base_model(input_ids=tokens, use_cache=False)
            except Exception as error:  # as in record_inputs
                problem = problem or first_line(error)
                continue
        if changed_between(calls) is None:
            return calls
        found.append(calls)
    if not found:
        raise not_one_at_a_time(model, problem)
    return found[0]


def _list_of(name: str) -> str:
    return name.rpartition(".")[0]


def _parameters(model: nn.Module, name: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(name).parameters())


def _shared(model: transformers.PreTrainedModel, blocks: list[str]) -> str | None:
    """A sentence about modules that are part of two blocks, if any are."""
    first: dict[int, tuple[str, str]] = {}
    for block in blocks:
        for name, parameter in model.get_submodule(block).named_parameters():
            owner, other = first.setdefault(id(parameter), (block, name))
            if owner != block:
                return f"{block} and {owner} share {other}"
    return None


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Children with linears of lists that are not inside another list."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return {
        f"{name}.{index}": child
        for name in outer
        for index, child in enumerate(lists[name])
        if any(isinstance(module, nn.Linear | Conv1D) for module in child.modules() if module is not child)
    }


def _device(model: nn.Module) -> torch.device:
    tensors = (*model.buffers(), *model.parameters())
    return next((one.device for one in tensors if one.device.type != "meta"), torch.device("cpu"))


@contextmanager
def _filled(model: nn.Module) -> Iterator[None]:
    """Give parameters without values one row of values, seen as the whole tensor, until the context ends."""
    device, kept = _device(model), []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                kept.append((module, name, parameter))
                row = torch.linspace(-1, 1, parameter.shape[-1] if parameter.ndim else 1, device=device)
                filled = row.to(parameter.dtype).expand(parameter.shape) if parameter.ndim else row[0]
                module.register_parameter(name, nn.Parameter(filled, requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in kept:
            module.register_parameter(name, parameter)
