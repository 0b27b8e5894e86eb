"""Divergence of the model when one group of layers alone is compressed, for every group and choice of strength (ours).

Every variant of the model differs in one group. All variants pass through the blocks together, so that each block is
loaded once and a variant runs only the blocks from its group's block on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from calibrant.engine.walk_checkpoints import WalkCheckpoints
from calibrant.errors import CalibrantError
from calibrant.journal import Journal
from calibrant.modeling.block_walk import BlockWalk, OpenedBlock
from calibrant.modeling.hooks import Hook, hooked, swapped
from calibrant.modeling.inputs import MicroBatch, finish
from calibrant.modeling.lazy_model import LazyModel
from calibrant.modeling.losses import divergences
from calibrant.modeling.structure import BlockStructure, InputGroup
from calibrant.modeling.token_rows import TokenRows
from calibrant.progress import Progress
from calibrant.quantization.statistics import HessianDiagonal
from calibrant.recipes.parts import Choice

# Length of the window in tokens, and the stride of compared tokens (ours).
WINDOW_TOKENS = 512
_STRIDE = 4
NAME = "sensitivity"
"""Name of the state in the journal."""

Compress = Callable[[torch.Tensor, torch.Tensor, Choice], torch.Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of one group of layers.

    Attributes:
        layers: full names of the linears.
        elements: number of weights.
        divergences: mean ``KL(original || variant)`` in nats at each choice, with these layers alone compressed.
    """

    layers: list[str]
    elements: int
    divergences: list[float]


@torch.inference_mode()
def measure_sensitivities(
    model: LazyModel,
    blocks: list[str],
    ignored: Callable[[str], bool],
    choices: list[Choice],
    compress: Compress,
    rows: TokenRows,
    dtype: torch.dtype,
    journal: Journal,
    progress: Progress,
) -> list[Sensitivity]:
    """Measure every group of linears that share an input at each of ``choices``.

    ``compress`` maps a weight ``[out, in]``, the sums of squared inputs ``[in]`` and a choice to the compressed weight.
    The data is the window of 512 tokens with the most counted tokens; every fourth of these is compared. The variants'
    hidden states are saved in ``journal`` between blocks; the caller drops the state.

    Raises:
        CalibrantError: a block contains fused experts, or the set has no counted token.
    """
    walk = BlockWalk(model, blocks, _one_window(rows), dtype)
    (trunk,) = walk.batches
    checkpoints = WalkCheckpoints(walk, journal, NAME)
    known = checkpoints.found or {"variants": [], "groups": []}
    variants: list[torch.Tensor] = [hidden.to(model.device) for hidden in known["variants"]]
    groups: list[tuple[list[str], int]] = [(names, elements) for names, elements in known["groups"]]

    def found_so_far() -> dict[str, Any]:
        return {"variants": variants, "groups": groups}

    for block in checkpoints.visit("measuring sensitivity", found_so_far, progress):
        inputs = _groups_to_compress(block.structure, block.name, ignored)
        variants = [block.run_on(hidden, trunk) for hidden in variants]
        diagonals, after = _diagonals(block, inputs, trunk)
        for stage, diagonal in zip(inputs, diagonals, strict=True):
            groups.append(_named(block.name, stage))
            for choice in choices:
                with swapped(_compressed(block, stage, diagonal, choice, compress)):
                    variants.append(block.run(trunk))
        block.advance([after])
    found = _divergences(walk, trunk, variants, progress)
    size = len(choices)
    return [
        Sensitivity(names, elements, found[number * size : (number + 1) * size])
        for number, (names, elements) in enumerate(groups)
    ]


def _one_window(given: TokenRows) -> TokenRows:
    """The first window with the most counted tokens, among windows that overlap by half."""
    length = given.counted.shape[1]
    last = max(0, length - WINDOW_TOKENS)
    begins = [*range(0, last, WINDOW_TOKENS // 2), last]
    counted = torch.stack([given.counted[:, begin : begin + WINDOW_TOKENS].sum(1) for begin in begins])
    window, row = divmod(int((counted == counted.max()).flatten().nonzero()[0]), len(given.counted))
    rows, here = slice(row, row + 1), slice(begins[window], begins[window] + WINDOW_TOKENS)
    return TokenRows(given.ids[rows, here], given.counted[rows, here])


def _groups_to_compress(structure: BlockStructure, prefix: str, ignored: Callable[[str], bool]) -> list[InputGroup]:
    stages = structure.without(lambda name: ignored(f"{prefix}.{name}")).stages
    groups = [stage for stage in stages if isinstance(stage, InputGroup)]
    if len(groups) < len(stages):
        raise CalibrantError(f"{prefix}: its experts are fused, so a budget cannot be spread over them")
    return groups


def _named(prefix: str, group: InputGroup) -> tuple[list[str], int]:
    sizes = (linear.out_features * linear.in_features for linear in group.linears)
    return [f"{prefix}.{linear.name}" for linear in group.linears], sum(sizes)


def _diagonals(
    block: OpenedBlock, groups: list[InputGroup], trunk: MicroBatch
) -> tuple[list[HessianDiagonal], torch.Tensor]:
    """Diagonal of the Hessian of every group's input in the unchanged block, and the block's output."""

    def hook(diagonal: HessianDiagonal) -> Hook:
        return lambda _, args, kwargs: diagonal.add(args[0].reshape(-1, args[0].shape[-1])[trunk.mask.flatten()])

    diagonals = [HessianDiagonal(group.linears[0].in_features, trunk.hidden.device) for group in groups]
    modules = [block.module.get_submodule(group.module) for group in groups]
    with hooked(zip(modules, map(hook, diagonals), strict=True)):
        return diagonals, block.run(trunk)


def _compressed(
    block: OpenedBlock, group: InputGroup, diagonal: HessianDiagonal, choice: Choice, compress: Compress
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of a parameter of the group and its compressed value."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for linear in group.linears:
        parameter = block.module.get_parameter(linear.parameter)
        value = compress(linear.view(parameter.data).float(), diagonal.values, choice)
        found.append((parameter, value.T if linear.transposed else value))
    return found


def _divergences(walk: BlockWalk, trunk: MicroBatch, variants: list[torch.Tensor], progress: Progress) -> list[float]:
    """Mean ``KL(trunk || variant)`` over the compared positions."""
    positions = trunk.mask[0].nonzero()[::_STRIDE, 0]

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return finish(walk.model.module, walk.blocks, hidden[:, positions])[0].double()

    found = []
    with walk.outside_loaded(), progress.task("comparing", len(variants), "candidates") as task:
        expected = logits(trunk.hidden)
        for hidden in variants:
            found.append(float(divergences(expected, logits(hidden)).mean().clamp(min=0)))
            task.advance()
    return found
