"""Sums of squared inputs of every layer in the original model, gathered block by block."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from calibrant.engine.block_engine import Unit, Visitor, two_passes
from calibrant.errors import CalibrantError
from calibrant.modeling.block_walk import BlockWalk
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.structure import BlockStructure, InputGroup
from calibrant.modeling.token_rows import TokenRows
from calibrant.progress import Progress
from calibrant.quantization.statistics import HessianDiagonal


class _Gathering(Visitor):
    """A ``Visitor`` that sums squared inputs and leaves the weights unchanged."""

    def __init__(self, structure: BlockStructure, prefix: str, device: torch.device) -> None:
        self._by_unit: dict[Unit, HessianDiagonal] = {}
        self.found: dict[str, list[HessianDiagonal]] = {}
        for stage in structure.stages:
            if isinstance(stage, InputGroup):
                norm = self._by_unit[stage.linears] = HessianDiagonal(stage.linears[0].in_features, device)
                self.found |= {f"{prefix}.{linear.name}": [norm] for linear in stage.linears}
                continue
            for group in stage.groups:
                norms = [HessianDiagonal(linear.in_features, device) for linear in group]
                self._by_unit |= {(linear,): norm for linear, norm in zip(group, norms, strict=True)}
                self.found[f"{prefix}.{group[0].parameter}"] = norms

    def add(self, unit: Unit, inputs: torch.Tensor, originals: torch.Tensor | None = None) -> None:
        self._by_unit[unit].add(inputs)

    def solve(self, unit: Unit) -> None:
        pass


@torch.inference_mode()
def input_squares(
    model: LazyModel, blocks: list[str], rows: TokenRows, progress: Progress
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sums of squared inputs ``[1, in]`` float32 and numbers of tokens ``[1, 1]`` int64, by name of every linear.

    Fused experts are listed under their parameter's name, with one row per expert that counts the tokens routed to it.

    Raises:
        CalibrantError: inputs are not finite.
    """
    found: dict[str, list[HessianDiagonal]] = {}
    for block in BlockWalk(model, blocks, rows, model.dtype).visit("gathering", progress):
        gathering = _Gathering(block.structure, block.name, model.device)
        block.advance(two_passes(block, block.structure, gathering))
        found |= gathering.found
    sums = {name: _as_rows(norms) for name, norms in found.items()}
    damaged = next((name for name, (total, _) in sums.items() if not np.isfinite(total).all()), None)
    if damaged is not None:
        raise CalibrantError(f"{damaged}: its inputs contain values that are not finite; check the model's weights")
    return sums


def linear_names(model: LazyModel, blocks: list[str]) -> list[str]:
    """Names of the linear modules in ``blocks``; fused experts are parameters, and no modules."""
    inside = tuple(f"{block}." for block in blocks)
    modules = model.module.named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear) and name.startswith(inside)]


def stored_names(model: LazyModel, layers: Iterable[str]) -> dict[str, str]:
    """The checkpoint's name of each layer's weight; the layer's own name if the checkpoint splits it."""

    def stored(layer: str) -> str:
        alone = (parameter for parameter in (layer, f"{layer}.weight") if model.is_stored_alone(parameter))
        return next(map(model.stored_name, alone), layer)

    return {layer: stored(layer) for layer in layers}


def _as_rows(norms: list[HessianDiagonal]) -> tuple[np.ndarray, np.ndarray]:
    sums = torch.stack([norm.values for norm in norms]).cpu().numpy()
    return sums, np.array([[norm.tokens] for norm in norms])
