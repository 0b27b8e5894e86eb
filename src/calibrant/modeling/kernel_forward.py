"""Modules whose forward a kernel computes, and their own forward again."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def has_kernel(module: nn.Module) -> bool:
    """Whether the module's own forward is replaced."""
    return "forward" in vars(module)


@contextmanager
def plain_modules(model: nn.Module) -> Iterator[None]:
    """Modules that have a kernel compute as they say meanwhile: kernels know no gradients and no float32."""
    fast = {module: vars(module).pop("forward") for module in model.modules() if has_kernel(module)}
    try:
        yield
    finally:
        for module, forward in fast.items():
            module.forward = forward
