"""A recorded call of a module, to be made again and on fewer rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_map

# Rounding of bfloat16 alone differs less.
_SAME = 1e-2


@dataclass(frozen=True)
class ModuleCall:
    """One call of a ``module`` on a micro-batch of ``mask`` ``[rows, length]``."""

    module: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: torch.Tensor

    def output(self) -> torch.Tensor:
        """Hidden states in float32, one row for each counted token."""
        return self._hidden()[self.mask]

    def shortened(self, rows: int) -> "ModuleCall":
        """On the first ``rows`` rows alone, if cutting the arguments gives the same output there."""
        if rows >= len(self.mask):
            return self
        part = self._part(slice(0, rows))
        wanted = self._hidden()[:rows]
        try:
            found = part._hidden()
        except (RuntimeError, ValueError, IndexError):
            return self
        same = found.shape == wanted.shape and bool((found - wanted).norm() <= _SAME * wanted.norm())
        return part if same else self

    def split(self) -> "list[ModuleCall]":
        """A call for each row, or this one if rows depend on one another."""
        count = len(self.mask)
        if count == 1 or len(self.shortened(1).mask) == count:
            return [self]
        return [self._part(slice(row, row + 1)) for row in range(count)]

    def _part(self, rows: slice) -> "ModuleCall":
        def cut(value: Any) -> Any:
            whole = isinstance(value, torch.Tensor) and value.shape[:1] == self.mask.shape[:1]
            return value[rows] if whole else value

        args, kwargs = tree_map(cut, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs, mask=self.mask[rows])

    def _hidden(self) -> torch.Tensor:
        output = self.module(*self.args, **self.kwargs)
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden.float().view(*self.mask.shape, -1)
