"""A recorded call of a module, which can be repeated on all or on fewer rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_map

# Relative difference of outputs; rounding to bfloat16 alone stays below it.
_SAME = 1e-2


@dataclass(frozen=True)
class ModuleCall:
    """One call of ``module`` on a micro-batch with counted tokens ``mask`` ``[rows, length]``."""

    module: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: torch.Tensor

    def output(self) -> torch.Tensor:
        """Hidden states of the counted tokens, float32 ``[tokens, width]``."""
        return self._hidden()[self.mask]

    def shortened(self, rows: int) -> "ModuleCall":
        """The call on the first ``rows`` rows, or this call if cutting the arguments changes their output."""
        if rows >= len(self.mask):
            return self
        part = self.part(slice(0, rows))
        wanted = self._hidden()[:rows]
        try:
            found = part._hidden()
        except (RuntimeError, ValueError, IndexError):
            return self
        same = found.shape == wanted.shape and bool((found - wanted).norm() <= _SAME * wanted.norm())
        return part if same else self

    def split(self) -> "list[ModuleCall]":
        """One call per row, or only this call if rows depend on one another."""
        count = len(self.mask)
        if count == 1 or len(self.shortened(1).mask) == count:
            return [self]
        return [self.part(slice(row, row + 1)) for row in range(count)]

    def part(self, rows: slice) -> "ModuleCall":
        """The call on ``rows`` alone, whether or not that gives what they give together."""

        def cut(value: Any) -> Any:
            whole = isinstance(value, torch.Tensor) and value.shape[:1] == self.mask.shape[:1]
            return value[rows] if whole else value

        args, kwargs = tree_map(cut, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs, mask=self.mask[rows])

    def _hidden(self) -> torch.Tensor:
        output = self.module(*self.args, **self.kwargs)
        hidden: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
        return hidden.float().view(*self.mask.shape, -1)
