"""Faster activation functions in bfloat16 on a CPU, the same bit for bit: a table of what the module gives."""

from collections.abc import Callable

import torch
from torch import nn

from calibrant.kernels.lookup import every_number, look_up
from calibrant.modeling.kernel_forward import has_kernel

# These already run as fast as memory.
_FAST = (nn.ReLU, nn.Identity, nn.Dropout)
# Within it no sum over the probe overflows, so that a function of several elements shows.
_LARGEST_PROBE = 1e3


def use_fast_activations(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give every module without parameters that computes a function of each number the table of its values.

    A module is known by what it computes, not by its name: on the same numbers in another order and shape it must give
    the same.
    """
    if dtype is not torch.bfloat16 or device.type != "cpu":
        return
    for module in model.modules():
        if has_kernel(module) or isinstance(module, _FAST) or not _holds_nothing(module):
            continue
        table = _table_of(module)
        if table is not None:
            module.forward = _forward(module.forward, table)


def _holds_nothing(module: nn.Module) -> bool:
    held = (module.children(), module.parameters(), module.buffers())
    return all(next(iter(one), None) is None for one in held)


def _forward(own: Callable[..., torch.Tensor], table: torch.Tensor) -> Callable[..., torch.Tensor]:
    def forward(inputs: torch.Tensor) -> torch.Tensor:
        return look_up(inputs, table) if inputs.dtype is torch.bfloat16 else own(inputs)

    return forward


def _table_of(module: nn.Module) -> torch.Tensor | None:
    """The module's values at all bfloat16 numbers; None if it is no function of one number."""
    numbers = every_number()
    probe = numbers[numbers.abs() <= _LARGEST_PROBE]
    order = torch.randperm(len(probe), generator=torch.Generator().manual_seed(0)).view(2, 1, -1)
    try:
        with torch.inference_mode():
            table, found, shuffled = module(numbers), module(probe), module(probe[order])
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # it takes something else than one tensor
        return None
    results = (table, found, shuffled)
    if not all(isinstance(one, torch.Tensor) and one.dtype is torch.bfloat16 for one in results):
        return None
    same = found.shape == probe.shape and torch.equal(found[order], shuffled)
    return table.clone() if same and table.shape == numbers.shape else None
