"""Modules whose forward is replaced by a kernel, and how to restore the original forward."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def has_kernel(module: nn.Module) -> bool:
    """Whether the module's forward is replaced by a kernel."""
    return "forward" in vars(module)


@contextmanager
def plain_modules(model: nn.Module) -> Iterator[None]:
    """Restore the original forwards inside the context, since kernels support neither gradients nor float32."""
    kernels = {module: vars(module).pop("forward") for module in model.modules() if has_kernel(module)}
    try:
        yield
    finally:
        for module, forward in kernels.items():
            module.forward = forward
