"""A recorded call of a module, to be made again and on fewer rows."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

# Rounding of bfloat16 alone differs less.
_SAME = 1e-2


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module on a micro-batch of ``mask``, of which ``rows`` rows are enough."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: torch.Tensor
    rows: int

    def output(self) -> torch.Tensor:
        """Hidden states in float32, one row for each counted token."""
        return self._hidden()[self.mask]

    def shortened(self) -> "ModuleCall":
        """On the first ``rows`` rows alone, if cutting the arguments gives the same output there."""

        def cut(value: Any) -> Any:
            whole = isinstance(value, torch.Tensor) and value.shape[:1] == self.mask.shape[:1]
            return value[: self.rows] if whole else value

        args, kwargs = tree_map(cut, (self.args, self.kwargs))
        part = replace(self, args=args, kwargs=kwargs, mask=self.mask[: self.rows])
        wanted = self._hidden()[: self.rows]
        try:
            found = part._hidden()
        except (RuntimeError, ValueError, IndexError):
            return self
        same = found.shape == wanted.shape and bool((found - wanted).norm() <= _SAME * wanted.norm())
        return part if same else self

    def _hidden(self) -> torch.Tensor:
        output = self.module(*self.args, **self.kwargs)
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden.float().view(*self.mask.shape, -1)
